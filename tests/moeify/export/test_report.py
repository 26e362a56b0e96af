from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from moeify.export.report import OnnxReport

REPORT = OnnxReport(
    path="x.onnx", target="cpu", quantize=None, dtype="float32", operators={"Add": 2}, relative=2e-6, max_abs_diff=1e-5,
    top1_agreement=1.0, tolerance=1e-5, rounding=None, rounding_largest=None, rounding_top1=None, cases=("1 x 1",),
    runtime="onnxruntime 1.32, CPUExecutionProvider", requires="1.23",
)  # fmt: skip


@pytest.mark.parametrize(("relative", "passed"), [(1e-5, True), (1.01e-5, False), (math.nan, False), (math.inf, False)])
def test_only_a_number_within_the_tolerance_passes(relative: float, passed: bool) -> None:
    assert replace(REPORT, relative=relative).passed is passed


def test_one_line_says_what_was_measured() -> None:
    assert REPORT.summary() == (
        "relative difference 2.00e-06 from PyTorch (tolerance 1e-05) in onnxruntime 1.32, CPUExecutionProvider, top-1 "
        "agreement 100.00%, on 1 x 1"
    )
    half = replace(REPORT, dtype="float16").summary()
    assert ", of the same graph in float32 (its float16 needs a GPU)," in half
    rounded = replace(REPORT, quantize="int4", rounding=0.1, rounding_largest=0.25, rounding_top1=0.5).summary()
    assert "from PyTorch with the same rounded weights (" in rounded
    assert rounded.endswith("; rounding to int4 changes 1.0e-01 by root mean squares, 2.5e-01 by the largest, "
                            "top-1 agreement 50.00%")  # fmt: skip


def test_it_is_plain_data() -> None:
    assert json.loads(json.dumps(REPORT.to_dict()))["operators"] == {"Add": 2}
