"""`moeify convert`: a dense checkpoint in, a proven MoE checkpoint out."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moeify.cli.options import LAYERS, Dtype, PartOf, Size, example_inputs_option, source_options
from moeify.cli.parallel import Ranks, estimated, parallel_options, show
from moeify.cli.recipe import recipe_option, recipe_text
from moeify.cli.settings import config_from, config_options
from moeify.cli.writing import DTYPES, GGUF, QUANTIZED, is_gguf, say_target, write
from moeify.families.words import MOEIFY, NATIVE, check_target
from moeify.files.staging import check_file, check_folder
from moeify.planning.selection import check_selection

if TYPE_CHECKING:
    from moeify.checkpoint.source import Accepted
    from moeify.config import MoEConfig
    from moeify.conversion.dense import DenseCheckpoint
    from moeify.plan import Plan


@dataclass(frozen=True)
class Options:
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
    accepted: Accepted
    ranks: Ranks | None


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
    type=Dtype((*DTYPES, *QUANTIZED)),
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
    options = Options(**{field.name: typed.pop(field.name) for field in fields(Options)})
    _check_usage(dst, options, typed)
    _check_place(dst, options)
    config = None if options.plan_file else config_from(typed)
    from moeify.checkpoint.source import open_source  # wrong usage is said before torch is loaded
    from moeify.conversion.dense import DenseCheckpoint
    from moeify.tracing.given_inputs import read_inputs

    inputs = None if options.example_inputs is None else read_inputs(options.example_inputs)
    with open_source(src, **options.accepted) as source:
        dense = DenseCheckpoint(source, inputs)
        plan = _plan(dense, config, options, gguf=is_gguf(dst))
        if dst is not None and not options.dry_run:
            write(dense, plan, dst, options)
        elif options.as_json:
            click.echo(plan.to_json(), nl=False)
        elif options.as_yaml:
            click.echo(recipe_text(click.get_current_context()), nl=False)
        else:
            _show(dense, plan, options, gguf=is_gguf(dst))


def _check_usage(dst: Path | None, options: Options, settings: dict[str, object]) -> None:
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


def _check_place(dst: Path | None, options: Options) -> None:
    """Refuse what does not go with a folder, or with a GGUF file, and look at what is there."""
    if not is_gguf(dst) and options.dtype in QUANTIZED:
        raise click.UsageError(f"--dtype {options.dtype} goes with a DST that ends in {GGUF}")
    if is_gguf(dst) and (options.resume or options.workers > 1 or options.part or options.join):
        what = "--resume, --workers, --part and --join go"
        raise click.UsageError(f"{what} with a folder: a {GGUF} file is written in one go")
    if is_gguf(dst) and options.target == MOEIFY:
        raise click.UsageError(f"--to {MOEIFY} goes with a folder: llama.cpp does not read it from a {GGUF} file")
    if dst is not None and not options.dry_run:
        (check_file if is_gguf(dst) else check_folder)(dst, overwrite=options.overwrite)


def _plan(dense: DenseCheckpoint, config: MoEConfig | None, options: Options, *, gguf: bool) -> Plan:
    from moeify.conversion.checkpoint import check_plan, plan_checkpoint
    from moeify.plan import Plan

    if config is not None:
        return plan_checkpoint(dense, config, options.layers, options.target, gguf=gguf)
    assert options.plan_file is not None
    saved = Plan.from_file(options.plan_file)
    check_plan(dense, saved, gguf=gguf)
    return saved


def _show(dense: DenseCheckpoint, plan: Plan, options: Options, *, gguf: bool) -> None:
    """Print a plan and what it would cost."""
    from moeify.checkpoint.tensor_info import ITEMSIZE
    from moeify.cli import display
    from moeify.conversion.cost import dense_cost, moe_cost
    from moeify.parallel.sizes import planned_layers

    console = display.stdout()
    say_target(console, dense, plan, "nothing is written", gguf=gguf)
    console.print(display.plan_table(plan))
    console.print()
    cost = moe_cost(dense, plan)
    console.print(display.cost_table((("dense", dense_cost(dense)), ("MoE", cost))))
    if options.ranks is not None:
        console.print()
        value_bytes = ITEMSIZE.get(DTYPES.get(options.dtype or "", ""))
        show(console, estimated(options.ranks, planned_layers(plan), cost, value_bytes))
