"""What an export says about itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and its proof.

    Attributes:
        path: The file.
        target: What it was made for.
        quantize: How the experts' weights are stored, None for the model's dtype.
        dtype: What it computes in.
        operators: How often each operator occurs in the graph, those of other domains with their domain.
        relative: Largest difference from PyTorch by its largest value, of several outputs the worst; with quantized
            weights from PyTorch with the same rounded weights.
        max_abs_diff: Largest difference.
        top1_agreement: Share of rows whose largest value is at the same place.
        tolerance: Largest relative difference that passes.
        rounding: What rounding changes, None without it: root mean square of the differences from PyTorch with the
            original weights, by that of its values.
        rounding_largest: The same as the largest difference by the largest value.
        rounding_top1: Share of rows whose largest value stays at its place after rounding.
        cases: The shapes of the proof.
        runtime: The ONNX Runtime that ran the proof, and its provider.
        requires: The oldest ONNX Runtime for this file.
    """

    path: str
    target: str
    quantize: str | None
    dtype: str
    operators: Mapping[str, int]
    relative: float
    max_abs_diff: float
    top1_agreement: float
    tolerance: float
    rounding: float | None
    rounding_largest: float | None
    rounding_top1: float | None
    cases: tuple[str, ...]
    runtime: str
    requires: str

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return math.isfinite(self.relative) and self.relative <= self.tolerance

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain data."""
        return asdict(self)

    def summary(self) -> str:
        """Return one line for people."""
        twin = f", of the same graph in float32 (its {self.dtype} needs a GPU)" if self.dtype != "float32" else ""
        same = " with the same rounded weights" if self.quantize else ""
        effect = ""
        if self.rounding is not None and self.rounding_largest is not None and self.rounding_top1 is not None:
            effect = (
                f"; rounding to {self.quantize} changes {self.rounding:.1e} by root mean squares, "
                f"{self.rounding_largest:.1e} by the largest, top-1 agreement {self.rounding_top1:.2%}"
            )
        return (
            f"relative difference {self.relative:.2e} from PyTorch{same} (tolerance {self.tolerance:.0e}) in "
            f"{self.runtime}{twin}, top-1 agreement {self.top1_agreement:.2%}, on {', '.join(self.cases)}{effect}"
        )
