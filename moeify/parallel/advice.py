"""An estimate of expert parallelism in words: which engine, which network, which capacity."""

from __future__ import annotations

from moeify.parallel.costs import Engine, LayerEstimate, Setup

_ENOUGH = 0.01  # a share of dropped choices that costs no quality worth counting


def advise(setup: Setup, layers: tuple[LayerEstimate, ...], engines: tuple[Engine, ...]) -> tuple[str, ...]:
    """Return what follows from the numbers, a sentence each."""
    costly = max(layers, key=lambda each: each.exchange_seconds)
    return (
        _engine(setup, layers, engines),
        _network(setup, costly),
        *(() if costly.layer.balanced else (_capacity(costly),)),
        _counting(costly.layer.top_k),
    )


def _engine(setup: Setup, layers: tuple[LayerEstimate, ...], engines: tuple[Engine, ...]) -> str:
    """Compare by what is waited for; say from which number of tokens on weights are the smaller thing to move."""
    shared, _, alone = engines
    better, worse = sorted((shared, alone), key=lambda engine: (engine.waits, engine.weights + engine.whole))
    moves = sum(each.layer.count * each.layer.top_k * each.layer.hidden for each in layers)
    exchanged = 4 * moves * setup.value_bytes * (setup.ep - 1) / setup.ep  # of a token
    even = (alone.gathered - shared.gathered) / exchanged
    why = f"{duration(better.waits)} of waiting per step, and {duration(worse.waits)} with {worse.name}"
    return f"engine: {better.name} ({why}); FSDP moves fewer bytes from {even:,.0f} tokens per rank on"


def _network(setup: Setup, costly: LayerEstimate) -> str:
    share = f"the exchange takes {costly.ratio:.0%} of the time of the experts"
    if costly.ratio > 1:
        return (
            f"network: {share}: keep the {setup.ep} ranks inside one node, where the network is faster, or let fewer "
            "ranks share the experts"
        )
    return f"network: {share}: it may cross nodes at {setup.bandwidth / 1e9:g} GB/s"


def _capacity(costly: LayerEstimate) -> str:
    """Advise none where ranks mostly compute; where they mostly wait, the smallest that drops next to nothing."""
    *limited, free = costly.at
    bound = next((at for at in limited if at.dropped < _ENOUGH), None)
    worst = f"without one a rank may get {free.worst_rows / max(free.rows, 1):.1f} times its mean rows"
    if bound is None:
        return f"capacity: none: every factor up to {limited[-1].factor} drops 1% or more; {worst}"
    bounded = f"factor {bound.factor} drops {bound.dropped:.2%} of random choices and bounds that"
    bounded += f" at {bound.worst_rows / max(free.rows, 1):.1f} (a real router is less even: see routing_stats)"
    if costly.ratio > 1:
        return f"capacity: factor {bound.factor}, for a slow exchange waits for the fullest rank: {worst}; {bounded}"
    return f"capacity: none, if memory holds the worst case: {worst}; {bounded}"


def _counting(top_k: int) -> str:
    others = f": a factor of GShard or ST-MoE, which leave it out, is {top_k} times ours" if top_k > 1 else ""
    return f"counting: factors count top_k, as everywhere in moeify (factor * tokens * top_k / experts){others}"


def duration(seconds: float) -> str:
    """Return a time for people."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
