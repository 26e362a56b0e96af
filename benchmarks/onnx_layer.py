"""Time one MoE layer in ONNX Runtime on one CPU thread: every form that the export writes, beside a dense FFN.

    python -m benchmarks.onnx_layer    a minute; writes record and page beside this file

Every form holds the router too and computes the same thing from the same weights. Rounds are interleaved, and routings
change from round to round; each figure is the median over rounds of the CPU time of the thread, which a busy machine
disturbs less than wall time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from benchmarks.by_turns import cpu_milliseconds, samples
from benchmarks.measure import key
from benchmarks.record import Record, keep, measured, rounded
from moeify.export.capture.to_onnx import to_onnx
from moeify.export.capture.trace import capture
from moeify.export.lower.contrib import interleaved, lower_contrib, set_attributes
from moeify.export.lower.standard import lower_standard
from moeify.export.targets import TARGETS, Operator
from moeify.kernels import ops

HIDDEN, INTERMEDIATE, TOP_K = 576, 1536, 2
EXPERTS = (8, 64)
TOKENS = {1: 300, 32: 60, 512: 9}  # and how many rounds
CODE = ("moeify/export/lower", "moeify/export/targets.py")
OURS = "moeify::SparseMoE"
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
        OURS: lowered(None),
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


def times(sessions: dict[str, Any], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of CPU time of each form, round by round; its routings change from round to round."""
    inputs = [torch.randn(tokens, HIDDEN).numpy() for _ in range(8)]

    def timed(form: Any, places: Iterator[int]) -> float:
        return cpu_milliseconds(lambda: form.run(None, {"x": inputs[next(places)]}))

    return rounded(samples({name: partial(timed, form, cycle(range(8))) for name, form in sessions.items()}, rounds), 3)


def measure(experts: int, inner: int) -> dict[str, dict[str, list[float]]]:
    """Return the times of one size, by tokens and form."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = {name: session(model, Path(folder)) for name, model in forms(experts, inner).items()}
    found = {}
    for tokens, rounds in TOKENS.items():
        even = tokens * TOP_K % experts == 0
        found[f"tokens_{tokens}"] = times({n: s for n, s in sessions.items() if even or n != APART}, tokens, rounds)
    return found


def summary(runs: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> dict[str, Any]:
    """Return, by experts and tokens, the milliseconds of each form and how many times as fast as the base it is."""
    found: dict[str, Any] = {}
    for size, columns in runs.items():
        for tokens, of_form in columns.items():
            base = median(of_form[BASE])
            found.setdefault(size, {})[tokens] = {
                key(name): {"name": name, "ms": median(ms), "gain": base / median(ms)} for name, ms in of_form.items()
            }
    ours = found["experts_8"]["tokens_1"]
    few = found["experts_8"]["tokens_32"]
    apart = few[key(APART)]["ms"]
    found["over_apart"] = {"body": few[key(OURS)]["ms"] / apart, "dense": few[key(DENSE)]["ms"] / apart}
    found["int4_over_float32"] = ours[key(OURS)]["ms"] / ours[key("QMoE int4")]["ms"]
    return found


def page(record: Record) -> str:
    """Return the page of a record."""
    lines = [
        "# One MoE layer in ONNX Runtime\n",
        f"{record.what}. Median CPU time; in brackets how many times as fast as {record.against}.",
        record.line(),
    ]
    for experts in EXPERTS:
        columns = record.summary[f"experts_{experts}"]
        lines.append(f"\n### {experts} experts, top-{TOP_K}, H = {HIDDEN}, I = {width(experts)}\n")
        lines += ["| form | " + " | ".join(f"{t} tokens" for t in TOKENS) + " |", "|---|" + "--:|" * len(TOKENS)]
        names = {name: row["name"] for column in reversed(columns.values()) for name, row in column.items()}
        for name, label in names.items():
            rows = [columns[f"tokens_{tokens}"].get(name) for tokens in TOKENS]
            cells = ["{ms:.2f} ms ({gain:.2f}x)".format(**row) if row else "" for row in rows]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def width(experts: int) -> int:
    """Return the intermediate size of one of so many experts: all sizes have the same weights."""
    return INTERMEDIATE * 8 // experts


def main() -> None:
    """Measure all sizes."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    runs = {f"experts_{experts}": measure(experts, width(experts)) for experts in EXPERTS}
    what = "One MoE layer, 1 thread, float32"
    keep(__file__, measured(what, BASE, CODE, summary(runs), runs, packages=("onnxruntime",)), page)


if __name__ == "__main__":
    main()
