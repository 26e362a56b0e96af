from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnxruntime import InferenceSession
from torch import Tensor, nn

from moeify.errors import RefusedError
from moeify.export.capture.interface import EXPERTS, GROUPED_LINEAR
from moeify.export.capture.to_onnx import to_onnx
from moeify.export.capture.trace import capture
from moeify.kernels import ops


class Layer(nn.Module):
    """Experts with a bias of the down projections alone, then a linear layer for each expert without one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 5, 7)), nn.Parameter(torch.randn(3, 7, 5))
        self.bias = nn.Parameter(torch.randn(3, 7))
        self.offsets = nn.Buffer(torch.tensor([0, 1, 2, 4], dtype=torch.int32))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        weights = torch.ones_like(ids, dtype=torch.float32)
        y = ops.experts(x, ids, weights, self.up, self.down, None, self.bias, activation="relu", gated=False)
        z: Tensor = ops.grouped_linear(y, self.down.transpose(1, 2).contiguous(), None, self.offsets)
        return z


def test_experts_are_opaque_nodes_with_their_inputs_in_place_and_named_weights() -> None:
    inputs = {"x": torch.randn(4, 7), "ids": torch.randint(0, 3, (4, 2))}
    graph = to_onnx(capture(Layer(), inputs)).graph
    (experts,) = [node for node in graph if node.op_type == EXPERTS]
    (linear,) = [node for node in graph if node.op_type == GROUPED_LINEAR]
    assert {experts.domain, linear.domain} == {"moeify"}
    names = [value and value.name for value in experts.inputs]
    assert names[:2] == ["x", "ids"] and names[3:] == ["up", "down", None, "bias"]
    assert experts.attributes["activation"].as_string() == "relu" and experts.attributes["gated"].as_int() == 0
    assert len(linear.inputs) == 4 and linear.inputs[2] is None
    assert [str(size) for size in graph.inputs[0].shape or ()] == ["batch", "7"]
    assert [str(size) for size in graph.outputs[0].shape or ()] == ["batch", "5"]


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("descending", [False, True])
def test_a_stable_sort_keeps_the_order_of_equals_along_its_dimension(dim: int | None, descending: bool) -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            along: Any = {} if dim is None else {"dim": dim}
            values, indices = torch.sort(x, stable=True, descending=descending, **along)
            return torch.stack([values, indices.float()])

    x = torch.randint(0, 3, (5, 7), generator=torch.Generator().manual_seed(0)).float()
    model = ir.to_proto(to_onnx(capture(Sorted(), {"x": x})))
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    assert found.tolist() == Sorted()(x).tolist()


def test_an_operator_that_onnx_lacks_is_refused() -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values: Tensor = torch.linalg.eigvalsh(x)
            return values

    with pytest.raises(RefusedError, match=r"^the model has an operator that ONNX cannot express: .*eigh"):
        to_onnx(capture(Inverse(), {"x": torch.randn(2, 3, 3)}))
