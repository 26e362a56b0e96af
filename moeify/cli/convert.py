"""`moeify convert`: a dense checkpoint in, a proven MoE checkpoint out."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeify.cli.options import LAYERS, Dtype, Size, command_line, example_inputs_option, source_options
from moeify.cli.parallel import Ranks, estimated, parallel_options, show
from moeify.cli.recipe import recipe_option, recipe_text
from moeify.cli.settings import config_from, config_options
from moeify.errors import CheckpointError, VerificationError
from moeify.families.words import MOEIFY, NATIVE, check_target
from moeify.files.staging import can_resume, check_folder
from moeify.planning.selection import check_selection

if TYPE_CHECKING:
    from rich.console import Console

    from moeify.checkpoint.source import Accepted
    from moeify.config import MoEConfig
    from moeify.conversion.dense import DenseCheckpoint
    from moeify.plan import Plan

_BEFORE_TRAINING = (
    "before training set model.config.output_router_logits = True, or nothing balances it; transformers balances all "
    "layers together, and lets single ones fall out of balance: --to moeify balances each"
)
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class _Options:
    """What was typed besides the paths and the settings; the help texts say what each means."""

    layers: str
    target: str
    dtype: str | None
    plan_file: Path | None
    dry_run: bool
    as_json: bool
    as_yaml: bool
    shard_size: int
    workers: int
    resume: bool
    overwrite: bool
    strict: bool
    no_verify: bool
    example_inputs: Path | None
    allow_pickle: bool
    trust_remote_code: bool
    dequantize: bool
    ranks: Ranks | None

    @property
    def accepted(self) -> Accepted:
        """What is accepted of the source."""
        return {
            "allow_pickle": self.allow_pickle,
            "trust_remote_code": self.trust_remote_code,
            "dequantize": self.dequantize,
        }


@click.command()
@click.argument("src")
@click.argument("dst", required=False, type=click.Path(path_type=Path))
@recipe_option
@config_options
@click.option("--layers", default="all", show_default=True, help=f"{LAYERS}.")
@click.option(
    "--to",
    "target",
    default="auto",
    show_default=True,
    help=f"auto, moeify, or a native family of transformers: {', '.join(NATIVE)}.",
)
@click.option("--dtype", type=Dtype(_DTYPES), help="Store floating-point tensors in this dtype.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path, dir_okay=False), help="Do what a saved plan says.")
@click.option("--dry-run", is_flag=True, help="Show the plan and its cost; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the plan as JSON, for --plan.")
@click.option("--yaml", "as_yaml", is_flag=True, help="With --dry-run: print these options as YAML, for --config.")
@click.option("--shard-size", type=Size(), default="5GB", show_default=True, help="Largest file of the output.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 256), help="Processes that write.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a model folder.")
@click.option("--strict", is_flag=True, help="Refuse weights that hold NaN or Inf instead of warning.")
@click.option("--no-verify", is_flag=True, help="Do not compare the MoE with the dense model.")
@example_inputs_option
@parallel_options
@source_options
def convert(src: str, dst: Path | None, **typed: Any) -> None:
    """Convert the dense checkpoint SRC into an MoE checkpoint DST.

    SRC is a folder in Hugging Face layout, a GGUF file, or a hub id; it is never changed. DST appears whole or not at
    all, after the first of its layers were compared with those of SRC, and the logits of that slice.
    """
    options = _Options(**{field.name: typed.pop(field.name) for field in fields(_Options)})
    _check_usage(dst, options, typed)
    config = None if options.plan_file else config_from(typed)
    from moeify.checkpoint.source import open_source  # wrong usage is said before torch is loaded
    from moeify.conversion.dense import DenseCheckpoint
    from moeify.tracing.given_inputs import read_inputs

    inputs = None if options.example_inputs is None else read_inputs(options.example_inputs)
    with open_source(src, **options.accepted) as source:
        dense = DenseCheckpoint(source, inputs)
        plan = _plan(dense, config, options)
        if dst is not None and not options.dry_run:
            _write(dense, plan, dst, options)
        elif options.as_json:
            click.echo(plan.to_json(), nl=False)
        elif options.as_yaml:
            click.echo(recipe_text(click.get_current_context()), nl=False)
        else:
            _show(dense, plan, options)


def _check_usage(dst: Path | None, options: _Options, settings: dict[str, object]) -> None:
    """Refuse what does not go together, before minutes of work."""
    if dst is None and not options.dry_run:
        raise click.UsageError("DST is missing: where should the MoE be written? (--dry-run needs none)")
    if options.as_json and not options.dry_run:
        raise click.UsageError("--json goes with --dry-run: the plan of a conversion is kept in DST/moeify.json")
    if options.as_yaml and (options.as_json or not options.dry_run):
        raise click.UsageError("--yaml goes with --dry-run and without --json")
    if options.ranks and (options.as_json or options.as_yaml or not options.dry_run):
        raise click.UsageError("--ep goes with --dry-run, without --json and --yaml (moeify inspect has --ep --json)")
    given = [name for name, value in settings.items() if value not in (None, ())]
    if options.plan_file and given:
        raise click.UsageError(f"{given[0]} goes without --plan: the plan says how to convert")
    check_target(options.target)
    check_selection(options.layers)
    if dst is not None and not options.dry_run:
        check_folder(dst, overwrite=options.overwrite)


def _plan(dense: DenseCheckpoint, config: MoEConfig | None, options: _Options) -> Plan:
    from moeify.conversion.checkpoint import check_plan, plan_checkpoint
    from moeify.plan import Plan

    if config is not None:
        return plan_checkpoint(dense, config, options.layers, options.target)
    assert options.plan_file is not None
    saved = Plan.from_file(options.plan_file)
    check_plan(dense, saved)
    return saved


def _say_target(console: Console, plan: Plan, what: str) -> None:
    """Print what becomes what, and what must be known of the format."""
    from moeify.families.table import remarks

    console.print(f"{plan.model_type} → {plan.target}: {what}")
    for remark in remarks(plan):
        console.print(f"note: {remark}")


def _show(dense: DenseCheckpoint, plan: Plan, options: _Options) -> None:
    """Print a plan and what it would cost."""
    from moeify.checkpoint.tensor_info import ITEMSIZE
    from moeify.cli import display
    from moeify.conversion.cost import dense_cost, moe_cost
    from moeify.parallel.sizes import planned_layers

    console = display.stdout()
    _say_target(console, plan, "nothing is written")
    console.print(display.plan_table(plan))
    console.print()
    cost = moe_cost(dense, plan)
    console.print(display.cost_table((("dense", dense_cost(dense)), ("MoE", cost))))
    if options.ranks is not None:
        console.print()
        value_bytes = ITEMSIZE.get(_DTYPES.get(options.dtype or "", ""))
        show(console, estimated(options.ranks, planned_layers(plan), cost, value_bytes))


def _write(dense: DenseCheckpoint, plan: Plan, dst: Path, options: _Options) -> None:
    """Write the MoE with a progress bar and, unless told otherwise, its proof."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from moeify.cli import display
    from moeify.conversion.checkpoint import Callbacks, Output, convert_checkpoint
    from moeify.names import left_out

    console, dtype = display.stderr(), _DTYPES.get(options.dtype or "")
    what = f"{len(plan.sites)} FFNs become {plan.config.experts} experts, top-{plan.config.top_k}"
    _say_target(console, plan, what)
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    task = (progress := Progress(*columns, console=console)).add_task("", total=None)

    def nonfinite(name: str) -> None:
        if options.strict:
            raise CheckpointError(f"{name} holds NaN or Inf (--strict): repair the source, or leave --strict out")
        console.print(f"warning: {name} holds NaN or Inf")

    def check(folder: Path) -> object:
        progress.stop()
        return _prove(dense, folder, plan, options, console)

    callbacks = Callbacks(
        total=lambda nbytes: progress.update(task, total=nbytes),
        written=lambda nbytes: progress.advance(task, nbytes),
        nonfinite=nonfinite,
        unused=lambda names: console.print(left_out(names)),
        check=check,
    )
    how = (options.overwrite, options.resume, options.workers, command_line())
    try:
        with progress:
            convert_checkpoint(dense, plan, Output(dst, options.shard_size, dtype, *how), callbacks)
    except KeyboardInterrupt as stop:
        hint = ": run again with --resume to go on" if can_resume(dst) else ""
        raise CheckpointError(f"interrupted; {dst} was not made{hint}") from stop
    console.print(f"written to {dst}")
    if plan.target != MOEIFY and plan.config.aux_loss:
        console.print(_BEFORE_TRAINING)


def _prove(dense: DenseCheckpoint, folder: Path, plan: Plan, options: _Options, console: Console) -> object:
    """Hold the output's tensors to its model, and compare a slice of the layers unless told otherwise.

    Returns:
        What was measured, as `moeify.json` keeps it.
    """
    from moeify.cli.quiet import without_bars
    from moeify.hub.structure import check_output
    from moeify.proving.proof import verify_slice

    with without_bars():
        check_output(folder)
        if options.no_verify:
            return None
        report = verify_slice(dense, folder, plan, cast_to=_DTYPES.get(options.dtype or ""))
    for line in report.warnings():
        console.print(line)
    console.print(f"verified on a slice: {report.summary()}")
    if not report.passed:
        raise VerificationError(f"{report.failure()}; nothing was written")
    return report.to_dict()
