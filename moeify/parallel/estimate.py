"""What expert parallelism costs, before it is paid: bytes, time, rows and memory, from sizes alone.

n ranks share the experts of a layer, M such groups hold copies of each other, N = n·M ranks in all. A network moves B
bytes per second to and from a rank, which does F floating-point operations per second.

Letters: T tokens of a rank, K top_k, E experts, e = E/n of them on a rank, C capacity of an expert for the tokens of
one rank, H hidden size, I intermediate size, J rows of the up projections, P parameters of an expert, b bytes of a
value.
"""

from __future__ import annotations

import math

from moeify.errors import ConfigError
from moeify.parallel.advice import advise
from moeify.parallel.costs import AtCapacity, Engine, Estimate, Layer, LayerEstimate, Setup
from moeify.parallel.dispatcher import HEADER
from moeify.routing.capacity import expert_capacity

FACTORS = (1.0, 1.25, 1.5, 2.0, None)
_COUNT, _INDEX, _WEIGHT, _ID = 8, 4, 4, 8  # bytes of a count, a row's index, a routing weight and an expert's id
_FSDP, _DDP = 3, 2  # how often an engine moves the experts in a step
_TRAINED = 4  # values of a parameter in training with AdamW: itself, its gradient and two moments


def estimate(setup: Setup) -> Estimate:
    """Count what a training step costs.

    Raises:
        ConfigError: There is nothing to share, or the ranks cannot share it evenly.
    """
    _check(setup)
    layers = tuple(_of_layer(layer, setup) for layer in setup.layers)
    engines = _engines(setup, layers)
    return Estimate(setup, layers, engines, advise(setup, layers, engines))


def exchanged_bytes(layer: Layer, setup: Setup, sent: int, received: int) -> int:
    """Return what a rank sends to other ranks in a layer and step, forward and backward.

    Forward, it sends counts and a header, a row and a weight for each choice that goes to another rank, and a row of
    results for each that came. Backward, the same ways back, it sends the gradients of each of these.

    Args:
        layer: The layer.
        setup: The ranks.
        sent: Choices that go from this rank to others.
        received: Choices that come from others to this one.
    """
    widest = max(other.experts for other in setup.layers) // setup.ep
    counts = (setup.ep - 1) * (HEADER + widest) * _COUNT
    return counts + (sent + received) * (2 * layer.hidden * setup.value_bytes + _WEIGHT)


def kept_bytes(layer: Layer, setup: Setup, rows: int) -> int:
    """Return what a layer's routed experts keep for backward on a rank that computes a number of rows.

    A row as it came, its up projections, weight and id; the indices of rows and choices; as our CPU kernels keep them.
    """
    row = (layer.hidden + layer.up_rows) * setup.value_bytes + _WEIGHT + _ID + _INDEX
    return rows * row + setup.tokens * layer.top_k * 2 * _INDEX + (layer.experts // setup.ep + 1) * _INDEX


def dropped_share(tokens: int, experts: int, top_k: int, capacity: int) -> float:
    """Return the share of choices that do not fit, if each token chose k different experts at random.

    An expert is then chosen by X ~ Binomial(T, K/E) tokens, and E[max(0, X - C)] · E / (T·K) of all choices are
    dropped, whatever the order. Real routers are less even and drop more.
    """
    chance, mean = top_k / experts, tokens * top_k / experts
    if chance == 1 or capacity >= tokens:
        return max(0, tokens - capacity) / tokens
    log_odds = math.log(chance) - math.log1p(-chance)
    overflow, chosen = 0.0, capacity + 1
    log_p = math.lgamma(tokens + 1) - math.lgamma(chosen + 1) - math.lgamma(tokens - chosen + 1)
    log_p += chosen * math.log(chance) + (tokens - chosen) * math.log1p(-chance)
    while chosen <= tokens:
        term = (chosen - capacity) * math.exp(log_p)
        overflow += term
        if chosen > mean and term < 1e-12 * overflow + 1e-300:
            break
        log_p += math.log(tokens - chosen) - math.log(chosen + 1) + log_odds if chosen < tokens else 0.0
        chosen += 1
    return overflow / mean


def worst_rows(layer: Layer, setup: Setup, capacity: int) -> int:
    """Return how many rows reach a rank if every token chooses its experts: n · min(e·C, T·min(K, e))."""
    here = layer.experts // setup.ep
    return setup.ep * min(here * capacity, setup.tokens * min(layer.top_k, here))


def _check(setup: Setup) -> None:
    if not setup.layers:
        raise ConfigError("there is no MoE layer, so there is nothing to share among ranks: give --experts and --top-k")
    for layer in setup.layers:
        if layer.slots:
            raise ConfigError(
                "soft mixtures send slots, whose number depends on the sequences and not on the tokens: their cost is "
                "not counted"
            )
        if layer.experts % setup.ep:
            fitting = " or ".join(str(n) for n in range(2, layer.experts + 1) if layer.experts % n == 0)
            raise ConfigError(
                f"{layer.experts} experts cannot be shared evenly by {setup.ep} ranks: choose --ep {fitting}"
            )


def _of_layer(layer: Layer, setup: Setup) -> LayerEstimate:
    factors = (layer.capacity_factor or 1.0,) if layer.balanced else FACTORS
    at = tuple(_at_capacity(layer, setup, factor) for factor in factors)
    # A forward pass multiplies each row by H·(J+I) weights, two operations each, and backward takes twice that.
    operations = 6 * setup.tokens * layer.top_k * layer.hidden * (layer.up_rows + layer.intermediate)
    own = next((row for row in at if row.factor == layer.capacity_factor), at[-1])
    return LayerEstimate(layer, at, own.exchanged / setup.bandwidth, operations / setup.flops)


def _at_capacity(layer: Layer, setup: Setup, factor: float | None) -> AtCapacity:
    tokens, experts, top_k = setup.tokens, layer.experts, layer.top_k
    capacity = tokens
    if factor is not None:
        least = 1 if layer.balanced else layer.min_capacity
        capacity = expert_capacity(tokens, experts, top_k, factor, minimum=least)
    if layer.balanced:
        dropped, rows = 0.0, experts * capacity
        worst = rows
    else:
        dropped = dropped_share(tokens, experts, top_k, capacity)
        rows, worst = round(tokens * top_k * (1 - dropped)), worst_rows(layer, setup, capacity)
    away = round(rows * (setup.ep - 1) / setup.ep)
    return AtCapacity(
        factor=factor,
        capacity=capacity,
        dropped=dropped,
        rows=rows,
        worst_rows=worst,
        exchanged=exchanged_bytes(layer, setup, away, away),
        kept=kept_bytes(layer, setup, rows),
        worst_kept=kept_bytes(layer, setup, worst),
    )


def _engines(setup: Setup, layers: tuple[LayerEstimate, ...]) -> tuple[Engine, ...]:
    """Compare what becomes of the experts.

    FSDP gathers weights before forward and backward and reduces gradients after it, each (N-1)/N of what is sharded:
    3·E·P·b·(N-1)/N of a layer, as ZeRO-3 does (Rajbhandari et al. 2020, arXiv:1910.02054); DDP reduces gradients alone,
    by twice as many bytes. Where weights are gathered, those of one layer are whole, with their gradients.
    """
    ranks, b, kinds = setup.ep * setup.copies, setup.value_bytes, [each.layer for each in layers]
    experts = sum(kind.count * kind.experts * kind.parameters for kind in kinds)
    rest = setup.parameters - experts
    whole = 2 * b * max(kind.experts * kind.parameters for kind in kinds)
    exchange = sum(each.layer.count * each.exchange_seconds for each in layers)
    compute = sum(each.layer.count * each.compute_seconds for each in layers)

    def engine(name: str, waited: float, values: float, sharded: float, among: int, passes: int) -> Engine:
        gathered = passes * sharded * b * (among - 1) / among
        return Engine(
            name=name,
            exchanged=round(waited * setup.bandwidth),
            gathered=round(gathered),
            waits=waited + max(0.0, gathered / setup.bandwidth - compute),
            weights=round(values * b * _TRAINED),
            whole=round(whole * sharded / experts) if passes == _FSDP and among > 1 else 0,
        )

    here = experts / setup.ep
    return (
        engine("EP and FSDP", exchange, setup.parameters / ranks, here, setup.copies, _FSDP),
        engine("EP and DDP", exchange, here + rest, here, setup.copies, _DDP),
        engine("FSDP alone", 0.0, setup.parameters / ranks, experts, ranks, _FSDP),
    )
