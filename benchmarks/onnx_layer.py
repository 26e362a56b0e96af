"""Time one MoE layer in ONNX Runtime on one CPU thread: every form that the export writes, beside a dense FFN.

    python -m benchmarks.onnx_layer            prints the table
    python -m benchmarks.onnx_layer --write    also writes it beside this file

Every form holds the router too and computes the same thing from the same weights. Rounds are interleaved, and routings
change from round to round; each figure is the median over rounds of the CPU time of the thread, which a busy machine
disturbs less than wall time.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from benchmarks.by_turns import cpu_milliseconds, medians
from moeify.export.capture.to_onnx import to_onnx
from moeify.export.capture.trace import capture
from moeify.export.lower.contrib import interleaved, lower_contrib, set_attributes
from moeify.export.lower.standard import lower_standard
from moeify.export.targets import TARGETS, Operator
from moeify.kernels import ops

HIDDEN, INTERMEDIATE, TOP_K = 576, 1536, 2
EXPERTS = (8, 64)
TOKENS = {1: 300, 32: 60, 512: 9}  # and how many rounds
BASE = "com.microsoft::MoE, by hand"
DENSE = "dense FFN of the active size"
APART = "a dense FFN for each expert, rows dealt evenly"  # the same weights and products, and no routing: the bound


class Layer(nn.Module):
    """A router and experts."""

    def __init__(self, experts: int, inner: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Parameter(torch.randn(experts, HIDDEN) * HIDDEN**-0.5)
        self.up = nn.Parameter(torch.randn(experts, 2 * inner, HIDDEN) * HIDDEN**-0.5)
        self.down = nn.Parameter(torch.randn(experts, HIDDEN, inner) * inner**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Route tokens (T, H) to two experts each."""
        logits, ids = (x @ self.router.t()).topk(TOP_K, dim=-1)
        return ops.experts(x, ids, logits.softmax(-1), self.up, self.down, activation="silu", gated=True)


class Dense(nn.Module):
    """A gated FFN as wide as the experts that a token visits."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(HIDDEN, TOP_K * inner, bias=False) for _ in range(2))
        self.down = nn.Linear(TOP_K * inner, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (T, H)."""
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


def by_hand(layer: Layer) -> ir.Model:
    """The contrib operator fed with the router's logits, as one would write it without moeify."""
    weights = {"router": layer.router.t().contiguous(), "up": interleaved(layer.up), "down": layer.down}
    value = helper.make_tensor_value_info
    node = helper.make_node(
        "MoE", ["x", "logits", "up", "", "down"], ["y"], domain="com.microsoft", k=TOP_K, activation_type="swiglu",
        swiglu_fusion=1, normalize_routing_weights=1, activation_alpha=1.0, activation_beta=0.0,
    )  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "router"], ["logits"]), node],
        "layer",
        [value("x", onnx.TensorProto.FLOAT, ["T", HIDDEN])],
        [value("y", onnx.TensorProto.FLOAT, ["T", HIDDEN])],
        [numpy_helper.from_array(tensor.detach().numpy(), name) for name, tensor in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def apart(layer: Layer) -> ir.Model:
    """Every expert's products on its even share of the rows, which are in order already: what routing is added to."""
    experts = range(layer.up.shape[0])
    weights = {f"up_{e}": layer.up[e] for e in experts} | {f"down_{e}": layer.down[e] for e in experts}
    value, node = helper.make_tensor_value_info, helper.make_node
    nodes = [
        node("Concat", ["x"] * TOP_K, ["rows"], axis=0),
        node("Split", ["rows"], [f"x_{e}" for e in experts], axis=0, num_outputs=len(experts)),
        *(node("Gemm", [f"x_{e}", f"up_{e}"], [f"z_{e}"], transB=1) for e in experts),
        node("Concat", [f"z_{e}" for e in experts], ["z"], axis=0),
        node("Split", ["z"], ["gate", "up"], axis=1, num_outputs=2),
        node("Sigmoid", ["gate"], ["sigmoid"]),
        node("Mul", ["gate", "sigmoid"], ["act"]),
        node("Mul", ["act", "up"], ["a"]),
        node("Split", ["a"], [f"a_{e}" for e in experts], axis=0, num_outputs=len(experts)),
        *(node("Gemm", [f"a_{e}", f"down_{e}"], [f"y_{e}"], transB=1) for e in experts),
        node("Concat", [f"y_{e}" for e in experts], ["y"], axis=0),
    ]
    graph = helper.make_graph(
        nodes,
        "experts",
        [value("x", onnx.TensorProto.FLOAT, ["T", HIDDEN])],
        [value("y", onnx.TensorProto.FLOAT, ["S", HIDDEN])],
        [numpy_helper.from_array(tensor.detach().numpy(), name) for name, tensor in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.serde.deserialize_model(model)


def forms(experts: int, inner: int) -> dict[str, ir.Model]:
    """Every form of the layer, by name."""
    layer = Layer(experts, inner)
    example = {"x": torch.randn(5, HIDDEN)}

    def lowered(operator: Operator | None) -> ir.Model:
        model = to_onnx(capture(layer, example))
        if operator is None:
            lower_standard(model)
        else:
            lower_contrib(model, operator)
            set_attributes(model, operator)
        return model

    quantized = TARGETS["cpu"].forms

    return {
        "moeify::SparseMoE": lowered(None),
        BASE: by_hand(layer),
        "com.microsoft::MoE": lowered(Operator()),
        "QMoE int8": lowered(quantized["int8"].operator),
        "QMoE int4": lowered(quantized["int4"].operator),
        APART: apart(layer),
        DENSE: to_onnx(capture(Dense(inner), example)),
    }


def session(model: ir.Model, folder: Path) -> Any:
    """Load a model with one thread."""
    onnxruntime = import_module("onnxruntime")
    ir.save(model, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(
        (folder / "model.onnx").read_bytes(), options, providers=["CPUExecutionProvider"]
    )


def times(sessions: dict[str, Any], tokens: int, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of CPU time of each form, whose routings change from round to round."""
    inputs = [torch.randn(tokens, HIDDEN).numpy() for _ in range(8)]

    def timed(form: Any, places: Iterator[int]) -> float:
        return cpu_milliseconds(lambda: form.run(None, {"x": inputs[next(places)]}))

    return medians({name: partial(timed, form, cycle(range(8))) for name, form in sessions.items()}, rounds)


def table(experts: int, inner: int) -> str:
    """Measure one size and draw it."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = {name: session(model, Path(folder)) for name, model in forms(experts, inner).items()}
    columns = {}
    for tokens, rounds in TOKENS.items():
        even = tokens * TOP_K % experts == 0
        columns[tokens] = times({n: s for n, s in sessions.items() if even or n != APART}, tokens, rounds)
    title = f"### {experts} experts, top-{TOP_K}, H = {HIDDEN}, I = {inner}"
    lines = [title, "", "| form | " + " | ".join(f"{t} tokens" for t in TOKENS) + " |", "|---|" + "--:|" * len(TOKENS)]
    for name in sessions:
        cells = [f"{c[name]:.2f} ms ({c[BASE] / c[name]:.2f}x)" if name in c else "" for c in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure all sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write onnx_layer.md")
    write = parser.parse_args().write
    versions = (
        f"onnxruntime {import_module('onnxruntime').__version__}, torch {torch.__version__}, {platform.machine()}"
    )
    text = "\n\n".join(
        [
            "# One MoE layer in ONNX Runtime",
            f"{versions}, 1 thread, float32. Median CPU time; in brackets how many times as fast as {BASE}.",
            *(table(experts, INTERMEDIATE * 8 // experts) for experts in EXPERTS),
        ]
    )
    print(text)
    if write:
        Path(__file__).with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
