"""One expert layer as an exported graph has it before it is lowered, and its float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import helper, numpy_helper
from torch import Tensor

from moeify.kernels import reference

EXPERTS, HIDDEN, INTERMEDIATE, CHOICES = 5, 7, 11, 2


@dataclass
class Layer:
    """Random weights of a layer; biases on request."""

    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    experts: int = EXPERTS
    hidden: int = HIDDEN
    intermediate: int = INTERMEDIATE
    up: Tensor = field(init=False)
    down: Tensor = field(init=False)
    up_bias: Tensor | None = field(init=False)
    down_bias: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        rows = self.intermediate * (2 if self.gated else 1)

        def normal(*shape: int) -> Tensor:
            values: Tensor = torch.randn(self.experts, *shape, generator=generator) / shape[-1] ** 0.5
            return values

        self.up, self.down = normal(rows, self.hidden), normal(self.hidden, self.intermediate)
        self.up_bias, self.down_bias = (normal(rows), normal(self.hidden)) if self.bias else (None, None)

    def reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        up_bias, down_bias = (None if t is None else t.double() for t in (self.up_bias, self.down_bias))
        return reference.experts(
            x.double(), ids, weights.double(), self.up.double(), self.down.double(), up_bias, down_bias,
            self.activation, self.gated,
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """The weights that the layer has, by the name of the operator's input."""
        given = {"up": self.up, "down": self.down, "up_bias": self.up_bias, "down_bias": self.down_bias}
        return {name: tensor for name, tensor in given.items() if tensor is not None}

    def graph(self) -> ir.Model:
        return graph_of(self)


def graph_of(*layers: Layer) -> ir.Model:
    """x, expert_ids, weights -> y0, y1, …, with one opaque `moeify::Experts` node for each layer."""
    value, float_, long = helper.make_tensor_value_info, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    nodes, initializers, outputs = [], [], []
    for number, layer in enumerate(layers):
        names = {name: f"layer{number}.{name}" for name in layer.tensors()}
        initializers += [numpy_helper.from_array(t.numpy(), names[name]) for name, t in layer.tensors().items()]
        inputs = ["x", "expert_ids", "weights", *names.values()]
        settings: dict[str, Any] = {"activation": layer.activation, "gated": int(layer.gated)}
        nodes.append(helper.make_node("Experts", inputs, [f"y{number}"], f"layer{number}", domain="moeify", **settings))
        outputs.append(value(f"y{number}", float_, ["T", layer.hidden]))
    inputs_ = [value("x", float_, ["T", layers[0].hidden]), value("expert_ids", long, ["T", CHOICES]),
               value("weights", float_, ["T", CHOICES])]  # fmt: skip
    graph = helper.make_graph(nodes, "layers", inputs_, outputs, initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("moeify", 1)]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def routing(layer: Layer, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, layer.hidden, generator=generator)
    ids = torch.rand(tokens, layer.experts, generator=generator).topk(CHOICES, -1).indices
    return x, ids, torch.rand(tokens, CHOICES, generator=generator) + 0.1


def run(model: ir.Model, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Check the model as a stranger would, and run it."""
    proto: Any = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    session = session_of(proto)
    feed = {"x": x.numpy(), "expert_ids": ids.numpy(), "weights": weights.numpy()}
    y: np.ndarray = session.run(None, feed)[0]
    return torch.from_numpy(y)


def session_of(proto: Any) -> Any:
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
