"""`moeify run`: text from an exported model."""

from __future__ import annotations

from pathlib import Path

import click

from moeify.errors import printable

_MOST = 1_000_000  # tokens
_TEXT = "\n\t\u200c\u200d"  # what text has that no name has: lines, tabs, and joiners of scripts and emoji


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1, _MOST), help="Where to stop.")
@click.option(
    "--provider", help="cpu, cuda or another of onnxruntime's. [default: the best of cuda and cpu that works]"
)
@click.option("--threads", default=0, show_default="onnxruntime decides", help="Threads inside an operator.")
def run(model: Path, prompt: str, max_new_tokens: int, provider: str | None, threads: int) -> None:
    """Continue a text with the exported causal language model MODEL, the most probable token each time.

    MODEL is what `moeify export` wrote, a file or a folder.

    The text goes to stdout; tokens per second and the provider in use go to stderr.
    """
    from moeify.cli import display
    from moeify.export.onnx_file import MODEL_FILE
    from moeify.runtime.text import TextModel

    text_model = TextModel(model / MODEL_FILE if model.is_dir() else model, provider=provider, threads=threads)
    said = False
    try:
        for piece in text_model.text(prompt, max_new_tokens):
            said = True
            click.echo(printable(piece, _TEXT), nl=False)
    finally:
        if said:
            click.echo()  # an error, too, starts on a line of its own
    display.stderr().print(f"{text_model.speed.summary()}, {text_model.provider}")
