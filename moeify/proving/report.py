"""What a proof has measured, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from torch import Tensor

from moeify.errors import VerificationError
from moeify.measure import TOLERANCE, WHOLE_TOLERANCE, name_of, relative_difference, top1_agreement, without_shared_nan
from moeify.names import left_out


@dataclass(frozen=True)
class LayerReport:
    """One MoE layer beside the dense FFN, both on what the FFN gets in the dense model.

    Attributes:
        name: The path of the layer.
        relative: Largest difference in a token's output by the largest value there.
        dtype: What both were computed in: float64 wherever the layer runs in it, whatever the model's dtype is.
    """

    name: str
    relative: float
    dtype: str

    @property
    def exact(self) -> bool:
        """Whether they are equal up to rounding."""
        return self.relative <= TOLERANCE[self.dtype]


@dataclass(frozen=True)
class VerifyReport:
    """What was measured. The layers decide; logits add up the rounding of all layers, so their tolerance is a wide one.

    Attributes:
        max_abs_diff: Largest absolute difference between two logits.
        max_abs_logit: Largest absolute logit of the dense model.
        relative: Their ratio.
        top1_agreement: Share of positions at which both models rank the same logit first.
        tolerance: Largest relative difference of the logits that passes; None if the method promises none.
        passed: Whether the promise holds.
        layers: Each MoE layer beside its dense FFN.
        outside: Relative difference of the logits when every MoE layer answers with what the dense FFN gave: what
            differs then is wrong outside of the layers. None if it was not measured.
        nan: How many logits are NaN in both models, at the same places: they do not count.
        unused: Names of the dense checkpoint's tensors that its model has no place for, which were left out.
        altered: Names of stored tensors that are not what the plan makes of the dense checkpoint.
    """

    max_abs_diff: float
    max_abs_logit: float
    relative: float
    top1_agreement: float
    tolerance: float | None
    passed: bool
    layers: tuple[LayerReport, ...] = ()
    outside: float | None = None
    nan: int = 0
    unused: tuple[str, ...] = ()
    altered: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain data."""
        return asdict(self)

    def summary(self) -> str:
        """Return one line for people."""
        promise = "no exactness promised" if self.tolerance is None else f"tolerance {self.tolerance:.0e}"
        return (
            f"{self._worst_layer()}logits: relative difference {self.relative:.2e} ({promise}), largest "
            f"{self.max_abs_diff:.2e} of {self.max_abs_logit:.3g}, top-1 agreement {self.top1_agreement:.2%}"
        )

    def _worst_layer(self) -> str:
        if not self.layers:
            return ""
        worst = max(self.layers, key=_badness)
        return f"{len(self.layers)} layers, the worst {worst.name} {worst.relative:.1e} in {worst.dtype}; "

    def warnings(self) -> tuple[str, ...]:
        """Return what people should know although it does not stop the proof, a line each."""
        lines = [left_out(self.unused)] if self.unused else []
        if self.nan:
            lines.append(f"warning: {self.nan} logits are NaN in both models, at the same places")
        return tuple(lines)

    def failure(self) -> str:
        """Return in one line what is wrong when the proof has not passed."""
        if self.altered:
            return (
                f"stored tensors that are not what moeify.json makes of the dense model: {len(self.altered)}, first "
                f"{self.altered[0]}; convert again, or remove moeify.json to hold the MoE to equality"
            )
        if self.tolerance is not None and self.layers and not all(layer.exact for layer in self.layers):
            worst = max(self.layers, key=_badness)
            return (
                f"{worst.name} differs from its dense FFN by {worst.relative:.1e} on the same input, expected at most "
                f"{TOLERANCE[worst.dtype]:.0e}"
            )
        if self.outside is not None and not self.outside <= TOLERANCE["float32"]:
            return f"the MoE differs outside of its MoE layers: the logits by {self.outside:.1e}"
        return "the MoE differs from the dense model by more than the tolerance"


def _badness(layer: LayerReport) -> float:
    """Return how far a layer is beyond its tolerance; NaN is the worst."""
    return math.inf if math.isnan(layer.relative) else layer.relative / TOLERANCE[layer.dtype]


def compare(
    expected: Tensor,
    result: Tensor,
    *,
    exact: bool,
    layers: tuple[LayerReport, ...] = (),
    outside: float | None = None,
) -> VerifyReport:
    """Compare the logits of a dense model and of its MoE, and judge them with what else was measured.

    Args:
        expected: What the dense model gives.
        result: What the MoE gives, in the same dtype.
        exact: Whether the method promises equality.
        layers: See `VerifyReport`.
        outside: Likewise.

    Raises:
        VerificationError: They have different shapes.
    """
    if expected.shape != result.shape:
        raise VerificationError(f"the dense model gives {tuple(expected.shape)}, the MoE {tuple(result.shape)}")
    dtype = name_of(expected.dtype)
    wide = (WHOLE_TOLERANCE if layers else TOLERANCE)[dtype]
    nan = int((expected.isnan() & result.isnan().to(expected.device)).sum())
    result, expected = without_shared_nan(result, expected)
    relative = relative_difference(result, expected)
    promised = not exact or (relative <= wide and all(layer.exact for layer in layers))
    return VerifyReport(
        max_abs_diff=(result.double() - expected.double()).abs().max().item(),
        max_abs_logit=expected.double().abs().max().item(),
        relative=relative,
        top1_agreement=top1_agreement(result, expected),
        tolerance=wide if exact else None,
        passed=math.isfinite(relative) and promised and (outside is None or outside <= TOLERANCE[dtype]),
        layers=layers,
        outside=outside,
        nan=nan,
    )
