"""Versions, providers, and the smallest session: where that fails, the driver dislikes the package."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from benchmarks.gpu.onnx.sessions import Bound, open_session
from benchmarks.gpu.run import Run
from moeify.measure import relative_difference


def stage(run: Run) -> None:
    """Write the versions and run two operators."""
    run.put(
        "versions", torch=torch.__version__, cuda=torch.version.cuda, onnxruntime=onnxruntime.__version__,
        at=str(Path(onnxruntime.__file__).parent), transformers=importlib.metadata.version("transformers"),
        gpu=None if run.dry else torch.cuda.get_device_name(), cores=os.cpu_count(),
    )  # fmt: skip
    run.put("providers", available=onnxruntime.get_available_providers())
    run.attempt("smallest session", _smallest, run)


def _smallest(run: Run) -> None:
    nodes = [helper.make_node("MatMul", ["x", "x"], ["z"]), helper.make_node("Sigmoid", ["z"], ["y"])]
    x_info, y_info = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 8]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "smallest", [x_info], [y_info])
    path = run.out / "smallest.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    session, x = open_session(run, path), torch.randn(8, 8)
    got = Bound(run, session, {"x": x}).run()["y"]
    difference = relative_difference(got, (x @ x).sigmoid())
    run.put("smallest session", providers=session.get_providers(), difference=difference, ok=difference < 1e-5)
