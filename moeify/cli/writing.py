"""What `moeify convert` does and prints from the plan on: writing, and the proof of what was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moeify.cli.options import command_line
from moeify.errors import CheckpointError, VerificationError
from moeify.families.words import MOEIFY
from moeify.files.staging import can_resume

if TYPE_CHECKING:
    from rich.console import Console

    from moeify.cli.convert import Options
    from moeify.conversion.checkpoint import Callbacks
    from moeify.conversion.dense import DenseCheckpoint
    from moeify.plan import Plan

_BEFORE_TRAINING = (
    "before training set model.config.output_router_logits = True, or nothing balances it; transformers balances all "
    "layers together, and lets single ones fall out of balance: --to moeify balances each"
)
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
GGUF, QUANTIZED = ".gguf", {"q8_0": "Q8_0"}


def is_gguf(dst: Path | None) -> bool:
    """Whether an output is a GGUF file and not a folder."""
    return dst is not None and dst.suffix == GGUF


def say_target(console: Console, dense: DenseCheckpoint, plan: Plan, what: str, *, gguf: bool) -> None:
    """Print what becomes what, and what must be known of the format."""
    from moeify.families.gguf import gguf_remarks
    from moeify.families.table import remarks

    console.print(f"{plan.model_type} → {plan.target}: {what}")
    for remark in (gguf_remarks if gguf else remarks)(plan, dense.config):
        console.print(f"note: {remark}")


def write(dense: DenseCheckpoint, plan: Plan, dst: Path, options: Options) -> None:
    """Write the MoE with a progress bar and, unless told otherwise, its proof."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from moeify.cli import display
    from moeify.conversion.checkpoint import Callbacks
    from moeify.names import left_out

    console = display.stderr()
    what = f"{len(plan.sites)} FFNs become {plan.config.experts} experts, top-{plan.config.top_k}"
    say_target(console, dense, plan, what, gguf=is_gguf(dst))
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    task = (progress := Progress(*columns, console=console)).add_task("", total=None)

    def nonfinite(name: str) -> None:
        if options.strict:
            raise CheckpointError(f"{name} holds NaN or Inf (--strict): repair the source, or leave --strict out")
        display.warnings().print(f"warning: {name} holds NaN or Inf")

    def check(folder: Path) -> object:
        progress.stop()
        return _prove(dense, folder, plan, options, console, whole=not is_gguf(dst))

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
    if not left and plan.target != MOEIFY and plan.config.aux_loss and not is_gguf(dst):
        console.print(_BEFORE_TRAINING)


def _how_to_go_on(dst: Path, options: Options) -> str:
    if options.part:
        return ": run again to go on"
    return ": run again with --resume to go on" if can_resume(dst) else ""


def _carry_out(dense: DenseCheckpoint, plan: Plan, dst: Path, options: Options, callbacks: Callbacks) -> str | None:
    """Write a folder, a part of it, or a GGUF file; return why there is no output yet, if there is none."""
    from moeify.conversion.checkpoint import Output, convert_checkpoint
    from moeify.conversion.parts import convert_part, join_parts

    if is_gguf(dst):
        from moeify.conversion.gguf import GgufOutput, convert_to_gguf

        kind = {**DTYPES, **QUANTIZED}.get(options.dtype or "")
        convert_to_gguf(dense, plan, GgufOutput(dst, kind, options.overwrite, command_line()), callbacks)
        return None
    how = (options.overwrite, options.resume, options.workers, command_line())
    output = Output(dst, options.shard_size, DTYPES.get(options.dtype or ""), *how)
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
    dense: DenseCheckpoint, folder: Path, plan: Plan, options: Options, console: Console, *, whole: bool
) -> object:
    """Hold the output's tensors to its model, and compare a slice of the layers unless told otherwise.

    A folder that is not the whole output has the slice only, in the dtypes of the source.

    Returns:
        What was measured, as `moeify.json` keeps it.
    """
    from moeify.cli import display
    from moeify.cli.quiet import without_bars
    from moeify.hub.structure import check_output
    from moeify.proving.proof import verify_slice

    with without_bars():
        if whole:
            check_output(folder)
        if options.no_verify:
            return None
        report = verify_slice(dense, folder, plan, cast_to=DTYPES.get(options.dtype or "") if whole else None)
    for line in report.warnings():
        display.warnings().print(line)
    console.print(f"verified on a slice: {report.summary()}")
    if not report.passed:
        raise VerificationError(f"{report.failure()}; nothing was written")
    return report.to_dict()
