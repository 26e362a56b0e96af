"""The command line: the only place that knows click and rich, prints, and decides exit codes.

Exit codes: 0 done, 1 refused or failed, 2 wrong usage. Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import gc
from difflib import get_close_matches
from importlib import import_module
from typing import cast

import click

from moeify import __version__
from moeify.cli.failures import one_line
from moeify.cli.options import COMMAND, quiet_option
from moeify.cli.quiet import quiet
from moeify.cli.signals import signals_as_interrupts

# The commands are in modules of their own, imported when they are called: `moeify --help` must not load torch.
COMMANDS = {
    "inspect": "Show the FFNs of a model, the look-alikes with reasons, and what an MoE would cost.",
    "convert": "Convert a dense checkpoint into an MoE checkpoint.",
    "families": "List the native formats, and which of them a checkpoint can become exactly.",
    "verify": "Compare the logits of a dense model and its MoE; exit 1 above tolerance.",
    "report": "Make a page about an MoE or a training run: which experts work, what it costs, its proof.",
    "export": "Export a checkpoint to a sparse ONNX model, proved in ONNX Runtime.",
    "run": "Generate text with an exported ONNX model.",
    "doctor": "Say what this machine can run, and check the kernels on it.",
    "demo": "Convert a real 135M-parameter model, prove it, and let it speak.",
}

# Objects between two looks for garbage. Importing torch and transformers makes a million that stay: with Python's 700,
# a sixth of a conversion's time would go into looking at them.
_COLLECT_AFTER = 500_000


class Commands(click.Group):
    """A group that imports a command's module when the command is used, and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import one command."""
        if name not in COMMANDS:
            return None
        command = cast("click.Command", getattr(import_module(f"moeify.cli.{name}"), name))
        return command if any(param.name == "quiet" for param in command.params) else quiet_option(command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, or say which one may have been meant."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            ctx.fail(f"there is no command {name!r}: {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep what was typed, for the model card of an output."""
        ctx.meta[COMMAND] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; whatever it raises becomes one line on stderr."""
        gc.set_threshold(_COLLECT_AFTER, 20, 100)
        with one_line(), quiet(), signals_as_interrupts():
            return super().invoke(ctx)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@quiet_option
@click.version_option(__version__, prog_name="moeify")
def main() -> None:
    """Turn a dense PyTorch transformer into a sparse Mixture-of-Experts, with a proof."""
