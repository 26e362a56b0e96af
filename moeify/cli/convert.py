"""`moeify convert`: a dense checkpoint in, a proven MoE checkpoint out."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeify.cli.options import LAYERS, Dtype, PartOf, Size, command_line, example_inputs_option, source_options
from moeify.cli.parallel import Ranks, estimated, parallel_options, show
from moeify.cli.recipe import recipe_option, recipe_text
from moeify.cli.settings import config_from, config_options
from moeify.errors import CheckpointError, VerificationError
from moeify.families.words import MOEIFY, NATIVE, check_target
from moeify.files.staging import can_resume, check_file, check_folder
from moeify.planning.selection import check_selection

if TYPE_CHECKING:
    from rich.console import Console

    from moeify.checkpoint.source import Accepted
    from moeify.config import MoEConfig
    from moeify.conversion.checkpoint import Callbacks
    from moeify.conversion.dense import DenseCheckpoint
    from moeify.plan import Plan

_BEFORE_TRAINING = (
    "before training set model.config.output_router_logits = True, or nothing balances it; transformers balances all "
    "layers together, and lets single ones fall out of balance: --to moeify balances each"
)
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_GGUF, _QUANTIZED = ".gguf", {"q8_0": "Q8_0"}


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
    part: tuple[int, int] | None
    join: bool
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
@click.option(
    "--dtype",
    type=Dtype((*_DTYPES, *_QUANTIZED)),
    help="Store floating-point tensors in this dtype; q8_0 in a .gguf file only.",
)
@click.option("--plan", "plan_file", type=click.Path(path_type=Path, dir_okay=False), help="Do what a saved plan says.")
@click.option("--dry-run", is_flag=True, help="Show the plan and its cost; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print the plan as JSON, for --plan.")
@click.option("--yaml", "as_yaml", is_flag=True, help="With --dry-run: print these options as YAML, for --config.")
@click.option("--shard-size", type=Size(), default="5GB", show_default=True, help="Largest file of the output.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 256), help="Processes that write.")
@click.option("--part", type=PartOf(), metavar="I/N", help="Write one of N parts; the last to finish makes DST.")
@click.option("--join", is_flag=True, help="Make DST of parts that are all written.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a model folder, or a .gguf file.")
@click.option("--strict", is_flag=True, help="Refuse weights that hold NaN or Inf instead of warning.")
@click.option("--no-verify", is_flag=True, help="Do not compare the MoE with the dense model.")
@example_inputs_option
@parallel_options
@source_options
def convert(src: str, dst: Path | None, **typed: Any) -> None:
    """Convert the dense checkpoint SRC into an MoE checkpoint DST.

    SRC is a folder in Hugging Face layout, a GGUF file, or a hub id; it is never changed. DST is a folder, or a file
    that ends in .gguf, for llama.cpp. It appears whole or not at all, after the first of its layers were compared with
    those of SRC, and the logits of that slice.
    """
    options = _Options(**{field.name: typed.pop(field.name) for field in fields(_Options)})
    _check_usage(dst, options, typed)
    _check_place(dst, options)
    config = None if options.plan_file else config_from(typed)
    from moeify.checkpoint.source import open_source  # wrong usage is said before torch is loaded
    from moeify.conversion.dense import DenseCheckpoint
    from moeify.tracing.given_inputs import read_inputs

    inputs = None if options.example_inputs is None else read_inputs(options.example_inputs)
    with open_source(src, **options.accepted) as source:
        dense = DenseCheckpoint(source, inputs)
        plan = _plan(dense, config, options, gguf=_is_gguf(dst))
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
    if (options.part or options.join) and (options.dry_run or (options.part and options.join)):
        raise click.UsageError("--part and --join go without each other and without --dry-run")
    given = [name for name, value in settings.items() if value not in (None, ())]
    if options.plan_file and given:
        raise click.UsageError(f"{given[0]} goes without --plan: the plan says how to convert")
    check_target(options.target)
    check_selection(options.layers)


def _is_gguf(dst: Path | None) -> bool:
    return dst is not None and dst.suffix == _GGUF


def _check_place(dst: Path | None, options: _Options) -> None:
    """Refuse what does not go with a folder, or with a GGUF file, and look at what is there."""
    if not _is_gguf(dst) and options.dtype in _QUANTIZED:
        raise click.UsageError(f"--dtype {options.dtype} goes with a DST that ends in {_GGUF}")
    if _is_gguf(dst) and (options.resume or options.workers > 1 or options.part or options.join):
        what = "--resume, --workers, --part and --join go"
        raise click.UsageError(f"{what} with a folder: a {_GGUF} file is written in one go")
    if _is_gguf(dst) and options.target == MOEIFY:
        raise click.UsageError(f"--to {MOEIFY} goes with a folder: llama.cpp does not read it from a {_GGUF} file")
    if dst is not None and not options.dry_run:
        (check_file if _is_gguf(dst) else check_folder)(dst, overwrite=options.overwrite)


def _plan(dense: DenseCheckpoint, config: MoEConfig | None, options: _Options, *, gguf: bool) -> Plan:
    from moeify.conversion.checkpoint import check_plan, plan_checkpoint
    from moeify.plan import Plan

    if config is not None:
        return plan_checkpoint(dense, config, options.layers, options.target, gguf=gguf)
    assert options.plan_file is not None
    saved = Plan.from_file(options.plan_file)
    check_plan(dense, saved, gguf=gguf)
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
    from moeify.conversion.checkpoint import Callbacks
    from moeify.names import left_out

    console = display.stderr()
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
        return _prove(dense, folder, plan, options, console, whole=not _is_gguf(dst))

    callbacks = Callbacks(
        total=lambda nbytes: progress.update(task, total=nbytes),
        written=lambda nbytes: progress.advance(task, nbytes),
        nonfinite=nonfinite,
        unused=lambda names: console.print(left_out(names)),
        check=check,
    )
    try:
        with progress:
            left = _carry_out(dense, plan, dst, options, callbacks)
    except KeyboardInterrupt as stop:
        raise CheckpointError(f"interrupted; {dst} was not made{_how_to_go_on(dst, options)}") from stop
    console.print(left or f"written to {dst}")
    if not left and plan.target != MOEIFY and plan.config.aux_loss and not _is_gguf(dst):
        console.print(_BEFORE_TRAINING)


def _how_to_go_on(dst: Path, options: _Options) -> str:
    if options.part:
        return ": run again to go on"
    return ": run again with --resume to go on" if can_resume(dst) else ""


def _carry_out(dense: DenseCheckpoint, plan: Plan, dst: Path, options: _Options, callbacks: Callbacks) -> str | None:
    """Write a folder, a part of it, or a GGUF file; return why there is no output yet, if there is none."""
    from moeify.conversion.checkpoint import Output, convert_checkpoint
    from moeify.conversion.parts import convert_part, join_parts

    if _is_gguf(dst):
        from moeify.conversion.gguf import GgufOutput, convert_to_gguf

        kind = {**_DTYPES, **_QUANTIZED}.get(options.dtype or "")
        convert_to_gguf(dense, plan, GgufOutput(dst, kind, options.overwrite, command_line()), callbacks)
        return None
    how = (options.overwrite, options.resume, options.workers, command_line())
    output = Output(dst, options.shard_size, _DTYPES.get(options.dtype or ""), *how)
    if options.join:
        join_parts(dense, plan, output, callbacks)
    elif options.part is None:
        convert_checkpoint(dense, plan, output, callbacks)
    else:
        missing, part = convert_part(dense, plan, output, callbacks, *options.part), "{}/{}".format(*options.part)
        if missing is None:
            return f"part {part} is written, and another run makes {dst} of all parts"
        if missing:
            return f"part {part} is written; {dst} is made when these are: {', '.join(map(str, missing))}"
    return None


def _prove(
    dense: DenseCheckpoint, folder: Path, plan: Plan, options: _Options, console: Console, *, whole: bool
) -> object:
    """Hold the output's tensors to its model, and compare a slice of the layers unless told otherwise.

    A folder that is not the whole output has the slice only, in the dtypes of the source.

    Returns:
        What was measured, as `moeify.json` keeps it.
    """
    from moeify.cli.quiet import without_bars
    from moeify.hub.structure import check_output
    from moeify.proving.proof import verify_slice

    with without_bars():
        if whole:
            check_output(folder)
        if options.no_verify:
            return None
        report = verify_slice(dense, folder, plan, cast_to=_DTYPES.get(options.dtype or "") if whole else None)
    for line in report.warnings():
        console.print(line)
    console.print(f"verified on a slice: {report.summary()}")
    if not report.passed:
        raise VerificationError(f"{report.failure()}; nothing was written")
    return report.to_dict()
