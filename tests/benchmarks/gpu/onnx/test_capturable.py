from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from benchmarks.gpu.onnx.capturable import capturable


def save(path: Path, add: tuple[str, str]) -> Path:
    """Positions as a decoder may have them: Range(0, n) plus the length of what came before."""
    node, info = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Shape", ["past"], ["past_shape"]),
        node("Squeeze", ["past_shape"], ["size"]),
        node("Range", ["zero", "count", "one"], ["range"]),
        node("Add", list(add), ["positions"]),
    ]
    inputs = [info("past", TensorProto.FLOAT, ["P"]), info("count", TensorProto.INT64, [])]
    constants = [helper.make_tensor(name, TensorProto.INT64, [], [value]) for name, value in (("zero", 0), ("one", 1))]
    graph = helper.make_graph(nodes, "positions", inputs, [info("positions", TensorProto.INT64, ["S"])], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("add", [("range", "size"), ("size", "range")])
def test_positions_are_the_same_without_a_copy_from_the_cpu(add: tuple[str, str], tmp_path: Path) -> None:
    path = save(tmp_path / "x.onnx", add)
    changed = capturable(path)
    assert changed == tmp_path / "x.capturable.onnx"
    (maker,) = [node for node in onnx.load(changed).graph.node if "positions" in node.output]
    assert maker.op_type == "Range"
    for past, count in ((0, 3), (5, 1)):
        feed: Any = {"past": np.zeros(past, np.float32), "count": np.array(count, np.int64)}
        for each in (path, changed):
            session: Any = onnxruntime.InferenceSession(str(each), providers=["CPUExecutionProvider"])
            assert session.run(None, feed)[0].tolist() == list(range(past, past + count))


def test_a_file_with_nothing_in_the_way_is_left(tmp_path: Path) -> None:
    path = save(tmp_path / "x.onnx", ("range", "one"))
    assert capturable(path) == path and list(tmp_path.iterdir()) == [path]
