from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from moeify.export.join import _varint, join
from tests.moeify.export.lower.layer_graph import Layer


@pytest.mark.parametrize("threshold", [0, 64, 10**9])
def test_the_model_is_the_one_that_a_single_file_would_hold(tmp_path: Path, threshold: int) -> None:
    model = Layer().graph()
    model.metadata_props["moeify.target"] = "cpu"
    ir.save(model, tmp_path / "whole.onnx")
    ir.save(model, tmp_path / "x.onnx", external_data="x.data", size_threshold_bytes=threshold)
    (tmp_path / "x.data").touch()
    join(tmp_path / "x.onnx", tmp_path / "x.data")
    assert not (tmp_path / "x.data").exists()
    whole, joined = onnx.load(tmp_path / "whole.onnx"), onnx.load(tmp_path / "x.onnx")
    values = [{t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (whole, joined)]
    assert values[0].keys() == values[1].keys() and len(values[0]) > 1
    assert all(np.array_equal(values[0][name], value) for name, value in values[1].items())
    for each in (whole, joined):
        del each.graph.initializer[:]
    assert whole == joined
    onnx.checker.check_model(onnx.load(tmp_path / "x.onnx"))


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**31, 2**40 + 5])
def test_a_number_is_read_back_as_protobuf_does(number: int) -> None:
    dimension = onnx.TensorProto.FromString(b"\x08" + _varint(number))  # field 1, dims
    assert list(dimension.dims) == [number]
