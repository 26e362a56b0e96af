from __future__ import annotations

from dataclasses import replace

import torch

from moeify.proving.report import LayerReport, VerifyReport, compare

ONES = torch.ones(2, 3)
GOOD, ROUNDED = LayerReport("a.0", 1e-15, "float64"), LayerReport("a.1", 1e-7, "float32")
BAD, LOST = LayerReport("a.2", 1e-11, "float64"), LayerReport("a.3", float("nan"), "float64")


def judged(*layers: LayerReport, exact: bool = True, outside: float | None = None, off: float = 0.0) -> VerifyReport:
    return compare(ONES, ONES + off, exact=exact, layers=layers, outside=outside)


def test_layers_decide_and_logits_have_a_wide_tolerance_beside_them() -> None:
    assert judged(GOOD, ROUNDED, off=1e-4).passed
    assert not judged(off=1e-4).passed
    assert not judged(GOOD, off=2e-2).passed
    for layer in (BAD, LOST):
        report = judged(GOOD, layer, ROUNDED)
        assert not report.passed and layer.name in report.failure() and f"worst {layer.name}" in report.summary()
        assert judged(GOOD, layer, exact=False).passed


def test_what_is_wrong_outside_is_wrong_for_every_method() -> None:
    for exact in (True, False):
        assert judged(GOOD, outside=1e-7, exact=exact).passed
        report = judged(GOOD, outside=1e-4, exact=exact)
        assert not report.passed and "outside of its MoE layers: the logits by 1.0e-04" in report.failure()
        assert not judged(GOOD, outside=float("nan"), exact=exact).passed


def test_the_worst_layer_is_the_farthest_beyond_its_own_tolerance() -> None:
    assert "2 layers, the worst a.1 1.0e-07 in float32" in judged(GOOD, ROUNDED).summary()
    assert "the worst a.2 1.0e-11 in float64" in judged(ROUNDED, BAD).summary()
    assert "layers" not in judged().summary()


def test_warnings_are_lines_and_tensors_that_differ_are_the_first_reason() -> None:
    report = replace(judged(BAD), nan=3, unused=("x",), altered=("y", "z"))
    assert len(report.warnings()) == 2 and "3 logits are NaN" in report.warnings()[1]
    assert "2, first y" in report.failure() and "\n" not in report.failure()
    assert judged().warnings() == ()
    assert report.to_dict()["layers"] == ({"name": "a.2", "relative": 1e-11, "dtype": "float64"},)
