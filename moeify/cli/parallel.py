"""The options that ask what expert parallelism would cost, and the answer for people."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moeify.conversion.cost import Cost
    from moeify.parallel.costs import Estimate, Layer, LayerEstimate

Result = TypeVar("Result")


class Ranks(NamedTuple):
    """What was typed: numbers of ranks and tokens, GB/s and TFLOP/s."""

    ep: int
    dp: int
    tokens: int
    bandwidth: float
    flops: float


def parallel_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """Add `--ep` and what belongs to it; the command gets them as `ranks`, None without `--ep`."""

    @click.option("--ep", type=click.IntRange(2, 8192), help="Count the cost of N ranks that share the experts.")
    @click.option("--dp", default=1, show_default=True, type=click.IntRange(1, 10**6), help="Such groups of N ranks.")
    @click.option(
        "--tokens", default=8192, show_default=True, type=click.IntRange(1, 10**9), help="Of a rank in a forward pass."
    )
    @click.option("--bandwidth", default=50.0, show_default=True, help="GB/s to and from a rank.")
    @click.option("--flops", default=400.0, show_default=True, help="TFLOP/s that a rank reaches.")
    @wraps(command)
    def with_ranks(*args: object, ep: int | None, **given: object) -> Result:
        typed = {name: given.pop(name) for name in Ranks._fields if name != "ep"}
        for name, value in typed.items():
            said = click.get_current_context().get_parameter_source(name)  # None where another command calls it
            if ep is None and said not in (None, ParameterSource.DEFAULT):
                raise click.UsageError(f"--{name} goes with --ep: how many ranks share the experts?")
            if not 0 < float(str(value)) < math.inf:
                raise click.UsageError(f"--{name} is {value}: expected a number above 0")
        return command(*args, ranks=None if ep is None else Ranks(ep=ep, **typed), **given)  # type: ignore[arg-type]

    return with_ranks


def estimated(ranks: Ranks, layers: tuple[Layer, ...], cost: Cost, value_bytes: int | None = None) -> Estimate:
    """Count what was asked for.

    Args:
        ranks: What was typed.
        layers: The MoE layers.
        cost: Of the model that has them.
        value_bytes: Of a value; None for what most of the checkpoint's have.
    """
    from moeify.parallel.costs import Setup
    from moeify.parallel.estimate import estimate

    each = value_bytes or max(1, round(cost.bytes / max(cost.parameters, 1)))
    bandwidth, flops = ranks.bandwidth * 1e9, ranks.flops * 1e12
    return estimate(Setup(layers, cost.parameters, each, ranks.ep, ranks.dp, ranks.tokens, bandwidth, flops))


def show(console: Console, estimate: Estimate) -> None:
    """Print an answer: what was assumed, a table for each kind of layer, one of engines, and advice."""
    from moeify.cli.display import wrapped

    setup = estimate.setup
    assumed = (
        f"{setup.ep} ranks share the experts, {setup.ep * setup.copies} ranks in all, {setup.tokens:,} tokens on each, "
        f"values of {setup.value_bytes} bytes; all numbers are of one rank and one step of training"
    )
    parts: list[str | Table] = [assumed]
    for each in estimate.layers:
        parts += [_heading(each), _capacities(each)]
    for part in (*parts, _engines(estimate), *estimate.advice):
        lines = wrapped([part], console.width) if isinstance(part, str) else [part, ""]
        for line in lines:
            console.print(line)


def _heading(each: LayerEstimate) -> str:
    from moeify.parallel.advice import duration

    layer = each.layer
    times = f"exchange {duration(each.exchange_seconds)}, experts {duration(each.compute_seconds)}"
    return f"each of {layer.count} MoE layers ({layer.experts} experts, top-{layer.top_k}): {times} ({each.ratio:.0%})"


def _capacities(each: LayerEstimate) -> Table:
    from moeify.cli.display import plain_table
    from moeify.names import quantity

    shown = plain_table("factor", "capacity", "dropped", "rows", "worst rows", "exchanged", "kept", "worst kept")
    for at in each.at:
        share = "by router" if each.layer.balanced else f"{at.dropped:.2%}"
        shown.add_row(
            "none" if at.factor is None else f"{at.factor:g}",
            "none" if at.factor is None else str(at.capacity),
            share,
            *map(quantity, (at.rows, at.worst_rows)),
            *(quantity(nbytes, "B") for nbytes in (at.exchanged, at.kept, at.worst_kept)),
        )
    return shown


def _engines(estimate: Estimate) -> Table:
    from moeify.cli.display import plain_table
    from moeify.names import quantity
    from moeify.parallel.advice import duration

    shown = plain_table("model", "tokens sent", "weights sent", "waits", "with AdamW", "whole besides")
    for engine in estimate.engines:
        sizes = [quantity(n, "B") for n in (engine.exchanged, engine.gathered, engine.weights, engine.whole)]
        shown.add_row(engine.name, *sizes[:2], duration(engine.waits), *sizes[2:])
    return shown
