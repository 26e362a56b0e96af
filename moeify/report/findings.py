"""What the numbers of a report say, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moeify.names import quantity, short_names
from moeify.report.data import OVERLOADED, Costs, LayerRouting, LayerWeights, Proof, Report, Training

_UNDECIDED, _ALIKE = 0.95, 0.99
_NAMED = 6  # experts that are named in a sentence


def findings(report: Report) -> tuple[str, ...]:
    """Return the sentences, the most telling first."""
    return tuple(_sentences(report))


def _sentences(report: Report) -> Iterator[str]:
    if report.routing:
        yield _idle(report.routing)
        yield from _overloaded(report.routing)
        yield from _dropped(report.routing)
        yield from _undecided(report.routing)
    if report.weights:
        yield from _alike(report.weights)
    if report.training is not None:
        yield from _run(report.training)
    if report.proofs:
        yield _proof(report.proofs[-1])
    elif report.layers:
        yield "Nothing says that it was compared with a dense model: name that as the second argument to do it."
    if report.costs is not None:
        yield _cost(report.costs)


def _idle(layers: Sequence[LayerRouting]) -> str:
    idle = [(name, expert) for name, layer in zip(_names(layers), layers, strict=True) for expert in layer.idle]
    count = sum(layer.experts for layer in layers)
    if not idle:
        return "Every expert got at least one token of this text: none is dead."
    named = ", ".join(f"{expert} of {name}" for name, expert in idle[:_NAMED])
    more = f" and {len(idle) - _NAMED} more" if len(idle) > _NAMED else ""
    return f"{len(idle)} of {count} experts got no token of this text: expert {named}{more}."


def _names(layers: Sequence[LayerRouting]) -> list[str]:
    names = short_names([layer.name for layer in layers])
    return [f"layer {name}" if name.isdigit() else name for name in names]


def _overloaded(layers: Sequence[LayerRouting]) -> Iterator[str]:
    over = sum(len(layer.overloaded) for layer in layers)
    name, busiest = max(zip(_names(layers), layers, strict=True), key=lambda found: max(found[1].load))
    times = max(busiest.load)
    where = f"expert {busiest.load.index(times)} of {name}"
    if over:
        yield (
            f"{over} of {sum(layer.experts for layer in layers)} experts took more than {OVERLOADED:g} times their "
            f"fair share; the busiest is {where}, with {times:.3g} times."
        )
    else:
        yield f"No expert took more than {OVERLOADED:g} times its fair share; the busiest is {where}, with {times:.3g}."


def _dropped(layers: Sequence[LayerRouting]) -> Iterator[str]:
    choices = sum(layer.choices for layer in layers)
    dropped = sum(layer.dropped * layer.choices for layer in layers)
    if dropped:
        yield f"{dropped / choices:.2%} of all choices found their expert full and were dropped."


def _undecided(layers: Sequence[LayerRouting]) -> Iterator[str]:
    mean = sum(layer.entropy for layer in layers) / len(layers)
    if mean > _UNDECIDED:
        yield f"The routers have hardly decided anything, as fresh ones: their entropy is {mean:.1%} of the largest."


def _alike(layers: Sequence[LayerWeights]) -> Iterator[str]:
    if all(layer.farthest is not None and layer.farthest[2] == 1 for layer in layers):
        yield "All experts of a layer hold equal weights: they are copies that training has not moved yet."
        return
    mean = sum(layer.mean for layer in layers) / len(layers)
    word = "still much alike" if mean > _ALIKE else "different"
    yield f"The experts of a layer are {word}: the mean cosine of two of them is {mean:.4g}."
    moved = [each for layer in layers for each in layer.distance]
    if moved:
        mean = sum(moved) / len(moved)
        yield f"The experts are {mean:.2%} away from the dense FFN on average, the farthest {max(moved):.2%}."


def _proof(proof: Proof) -> str:
    how = f"{len(proof.layers)} layers were compared {proof.when}"
    if not proof.passed:
        return f"It differs from the dense model: {how}. After training that is as it should be."
    if proof.tolerance is None:
        return f"Its method promises no equality with the dense model: {how}; logits differ by {proof.relative:.2g}"
    return f"It computes what the dense model computes, up to rounding: {how}, and each passed."


def _cost(costs: Costs) -> str:
    moe = costs.moe
    share = moe.active / max(moe.parameters, 1)
    return f"A token meets {quantity(moe.active)} of {quantity(moe.parameters)} parameters ({share:.0%})."


def _run(run: Training) -> Iterator[str]:
    known = {curve.name: [value for value in curve.values if value is not None] for curve in run.curves}
    if loss := known.get("loss"):
        yield f"The loss went from {loss[0]:.4g} to {loss[-1]:.4g} in {run.steps[-1]} steps."
    if busiest := known.get("busiest expert"):
        yield f"A layer's busiest expert took {busiest[0]:.3g} times its fair share at first, {busiest[-1]:.3g} last."
    if idle := known.get("experts without a token"):
        worst = f"{idle[-1]:.4g} experts got no token in the last window, {max(idle):.4g} in the worst."
        yield worst if max(idle) else "Every expert got a token in every logged window."
    dropped = known.get("dropped choices")
    if dropped and max(dropped):
        yield f"{dropped[-1]:.2%} of the choices were dropped in the last window."
