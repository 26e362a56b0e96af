"""How a quantized model is judged: something was quantized, the experts too, and its outputs stay near."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from moeify.measure import relative_difference
from sweeps.ecosystem.models import logits

NEAR = {8: 0.1, 4: 0.6}  # of the largest logit; the weights are random, so every rounding matters


def judge(model: Any, expected: Tensor, bits: int) -> Tensor:
    """Look whether the logits moved, and not far.

    Args:
        model: The quantized model.
        expected: The logits before.
        bits: Of a weight.

    Returns:
        The logits now.
    """
    found = logits(model)
    moved = relative_difference(found, expected)
    assert moved > 1e-5, "nothing was quantized: the logits are what they were"
    assert moved <= NEAR[bits], f"the logits are off by {moved:.2f} of the largest"
    return found


def expert_linears(model: Any) -> dict[str, Any]:
    """Return the modules that hold one projection of one expert, by their paths."""
    return {path: part for path, part in model.named_modules() if ".experts." in path and hasattr(part, "in_features")}


def all_of(modules: Iterable[Any], kind: str) -> None:
    """Look whether there are modules, and all of them are of a class of this name."""
    names = {type(module).__name__ for module in modules}
    assert names == {kind}, f"the experts are {', '.join(sorted(names)) or 'not there'}, not {kind}"
