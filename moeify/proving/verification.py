"""The proof of a conversion: the logits of the dense model and of the MoE, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeify.errors import VerificationError
from moeify.measure import TOLERANCE
from moeify.tracing.inputs import guess_inputs


@dataclass(frozen=True)
class VerifyReport:
    """What was measured.

    Attributes:
        max_abs_diff: Largest absolute difference between two logits.
        max_abs_logit: Largest absolute logit of the dense model.
        relative: Their ratio.
        top1_agreement: Share of positions at which both models rank the same logit first.
        tolerance: Largest relative difference that passes; None when the method promises none.
        passed: Whether the promise holds.
    """

    max_abs_diff: float
    max_abs_logit: float
    relative: float
    top1_agreement: float
    tolerance: float | None
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    def summary(self) -> str:
        """Return one line for people."""
        promise = "no exactness promised" if self.tolerance is None else f"tolerance {self.tolerance:.0e}"
        return (
            f"relative difference {self.relative:.2e} ({promise}), largest {self.max_abs_diff:.2e} "
            f"of {self.max_abs_logit:.3g}, top-1 agreement {self.top1_agreement:.2%}"
        )


@torch.no_grad()
def verify(
    dense: nn.Module, moe: nn.Module, inputs: Mapping[str, Any] | None = None, *, exact: bool = True
) -> VerifyReport:
    """Run both models on the same inputs and compare their logits (without a head: their first output).

    Args:
        dense: The model before.
        moe: The model after, in the same dtype; the tolerance is that dtype's.
        inputs: Keyword arguments of both forwards; None makes random ones for a transformers model.
        exact: Whether the method promises equality.

    Raises:
        VerificationError: the outputs have different shapes.
    """
    arguments = random_inputs(dense) if inputs is None else dict(inputs)
    before, after = (_logits(_evaluate(model, arguments)) for model in (dense, moe))
    if before.shape != after.shape:
        raise VerificationError(f"the dense model gives {tuple(before.shape)}, the MoE {tuple(after.shape)}")
    dtype = str(before.dtype).removeprefix("torch.")
    before, after = before.double(), after.double()
    difference, scale = (before - after).abs().max().item(), before.abs().max().item()
    relative = difference / scale if scale else difference
    tolerance = TOLERANCE[dtype] if exact else None
    agreement = (before.argmax(-1) == after.argmax(-1)).double().mean().item()
    passed = math.isfinite(relative) and (tolerance is None or relative <= tolerance)
    return VerifyReport(difference, scale, relative, agreement, tolerance, passed)


def random_inputs(model: nn.Module, seed: int = 0, *, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return inputs of the shapes that the model takes, filled with random token ids or normal values.

    Args:
        model: From transformers.
        seed: Of the numbers.
        like: Inputs of which those on the meta device are filled; None guesses them all.
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 2

    def fill(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator)
        if value.dtype is torch.bool:
            return torch.ones(value.shape, dtype=torch.bool)
        return torch.randint(0, vocabulary, value.shape, generator=generator)

    return {name: fill(value) for name, value in (guess_inputs(model) if like is None else like).items()}


def _evaluate(model: nn.Module, arguments: dict[str, Any]) -> Any:
    training = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # some models draw even in evaluation (ViT-MAE masks patches): both the same
            return model.eval()(**arguments)
    finally:
        model.train(training)


def _logits(output: Any) -> Tensor:
    """The logits of a transformers output, or the first floating-point tensor of anything else."""
    named = getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    values = list(output.values()) if isinstance(output, Mapping) else output
    values = values if isinstance(values, tuple | list) else [values]
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise VerificationError(f"{type(output).__name__} holds no floating-point tensor to compare")
