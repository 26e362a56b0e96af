"""`moeify inspect`: what is in a model, and what an MoE of it would cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moeify.cli.options import example_inputs_option, json_option, source_options
from moeify.cli.parallel import Ranks, estimated, parallel_options, show

if TYPE_CHECKING:
    from rich.console import Console

    from moeify.checkpoint.source import Accepted
    from moeify.conversion.summary import Summary
    from moeify.parallel.costs import Estimate

_LINES, _LINES_OF_ONE = 40, 4  # of what is shown without --all, and of one thing in it


@click.command()
@click.argument("src")
@click.option("--experts", default=8, show_default=True, help="Experts to count the cost for.")
@click.option("--top-k", default=2, show_default=True, help="Experts per token to count the cost for.")
@click.option("--all", "whole", is_flag=True, help=f"Show everything, not only what fits {_LINES} lines.")
@example_inputs_option
@json_option
@parallel_options
@source_options
def inspect(
    src: str,
    experts: int,
    top_k: int,
    whole: bool,
    example_inputs: Path | None,
    as_json: bool,
    ranks: Ranks | None,
    accepted: Accepted,
) -> None:
    """Show what is in SRC: MoE layers, FFNs, what an MoE of them would cost, and look-alikes with reasons.

    SRC is a folder in Hugging Face layout, dense or an MoE, a GGUF file, or a hub id. No weight is read.
    """
    from moeify.checkpoint.source import open_source
    from moeify.cli import display
    from moeify.cli.quiet import without_bars
    from moeify.config import MoEConfig
    from moeify.hub.describe import describe
    from moeify.tracing.given_inputs import read_inputs

    inputs = None if example_inputs is None else read_inputs(example_inputs)
    with open_source(src, **accepted) as source, without_bars():
        seen = describe(source, MoEConfig(experts, top_k), inputs)
    estimate = None if ranks is None else _estimated(seen, ranks)
    if as_json:
        parallel = {} if estimate is None else {"parallel": estimate.to_dict()}
        click.echo(json.dumps(seen.to_dict() | parallel, indent=2))
        return
    console = display.stdout()
    if estimate is not None:
        show(console, estimate)
        return
    sections = list(_sections(console, src, seen, f"{experts} experts, top-{top_k}", whole=whole))
    for line in display.fit(sections, sum(map(len, sections)) * 2 if whole else _LINES):
        console.print(line)


def _estimated(seen: Summary, ranks: Ranks) -> Estimate:
    """Count the ranks of the model as it is, or else as it would be converted."""
    from moeify.errors import ConfigError
    from moeify.parallel.sizes import found_layers, planned_layers

    if seen.layers:
        return estimated(ranks, found_layers(seen.layers), seen.dense)
    if seen.plan is None or seen.moe is None:
        raise ConfigError(f"--ep: there is no MoE layer to share, and none can be made: {seen.obstacle}")
    return estimated(ranks, planned_layers(seen.plan), seen.moe)


def _sections(console: Console, src: str, seen: Summary, wanted: str, *, whole: bool) -> Iterator[list[str]]:
    """Return the parts of what is shown, as lines; what can be cut comes last."""
    from moeify.cli import display

    def lines(shown: object) -> list[str]:
        with console.capture() as captured:
            console.print(shown)
        return [line.rstrip() for line in captured.get().splitlines()]

    found, width, most = seen.inspection, console.width, None if whole else _LINES_OF_ONE
    moe = f"{len(seen.layers)} MoE layers, " if seen.layers else ""
    yield display.wrapped([f"{src}: {seen.model_type}, {moe}{len(found.ffns)} dense FFNs"], width)
    if seen.layers:
        yield display.wrapped([*display.moe_lines(seen.layers), _tools(seen)], width, most)
    if found.ffns:
        yield lines(display.inspection_table(found))
    costs = [("as it is" if seen.layers else "dense", seen.dense)]
    costs += [] if seen.moe is None else [(wanted, seen.moe)]
    if seen.layers or seen.moe is not None:
        yield lines(display.cost_table(costs))
    if seen.obstacle:
        yield display.wrapped([f"cannot be converted in place: {seen.obstacle}"], width, most)
    if found.refused:
        yield display.wrapped(["no FFNs, though they look like it:", *display.refusal_lines(found)], width, most)


def _tools(seen: Summary) -> str:
    """Say what can be done with MoE layers."""
    obstacles = [layer.capacity_obstacle for layer in seen.layers.values() if layer.capacity_obstacle]
    can = "routing_stats, aux_loss, freeze, param_groups and RoutingCallback work on it"
    return f"{can}; set_capacity {f'does not ({obstacles[0]})' if obstacles else 'does too'}"
