from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moeify.errors import VerificationError
from moeify.export.prove import Case, Difference, compare

WANT = {"large": torch.tensor([[100.0, -50.0], [1.0, 2.0]]), "small": torch.tensor([[3e-6, 4e-6]])}


class Session:
    """Gives fixed outputs, as an `onnxruntime.InferenceSession` does."""

    def __init__(self, outputs: dict[str, torch.Tensor]) -> None:
        self.outputs = outputs

    def get_inputs(self) -> list[Any]:
        return []

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.outputs]

    def run(self, names: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [tensor.numpy() for tensor in self.outputs.values()]


def measured(**outputs: torch.Tensor) -> Difference:
    captured: Any = None  # read for keys and values only
    return compare(Session({**WANT, **outputs}), captured, [Case("one", {}, (), None, WANT)])


def test_the_same_outputs_do_not_differ() -> None:
    assert measured() == Difference(0.0, 0.0, 0.0, 1.0, ("one",))


def test_a_small_output_is_not_hidden_by_a_large_one() -> None:
    difference = measured(small=torch.tensor([[3e-6, 0.0]]))
    assert difference.max_abs_diff == pytest.approx(4e-6)
    assert difference.relative == pytest.approx(1.0)
    assert difference.rms == pytest.approx(0.8)
    assert difference.top1_agreement == pytest.approx(2 / 3)


def test_a_value_that_is_no_number_is_the_largest_difference() -> None:
    for bad in (math.nan, math.inf):
        difference = measured(large=torch.tensor([[100.0, bad], [1.0, 2.0]]))
        assert not math.isfinite(difference.relative)


def test_padding_does_not_count() -> None:
    live = torch.tensor([[True, False]])
    want = {"tokens": torch.tensor([[[1.0], [2.0]]]), "pooled": torch.tensor([[3.0, 4.0]])}
    case = Case("one", {}, (), live, want)
    captured: Any = None
    assert compare(Session({**want, "tokens": torch.tensor([[[1.0], [9.0]]])}), captured, [case]).relative == 0
    assert compare(Session({**want, "tokens": torch.tensor([[[9.0], [2.0]]])}), captured, [case]).relative > 1
    assert compare(Session({**want, "pooled": torch.tensor([[3.0, 9.0]])}), captured, [case]).relative > 1


def test_a_graph_that_does_not_run_is_one_line() -> None:
    class Failing(Session):
        def run(self, names: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Non-zero status code\nmore")

    captured: Any = None
    with pytest.raises(VerificationError, match=r"cannot run the exported graph on one: .* status code$"):
        compare(Failing({}), captured, [Case("one", {}, (), None, WANT)])
