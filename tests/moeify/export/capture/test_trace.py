from __future__ import annotations

import copy
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify.errors import RefusedError
from moeify.export.capture.to_onnx import to_onnx
from moeify.export.capture.trace import capture


class Loop(nn.Module):
    """Runs as often as there are positive numbers, as experts do that are computed one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        for place in (x.sum(-1) > 0).nonzero():
            x = x * (place[0] + 1)
        return x


class Casting(nn.Module):
    """Casts its weights in the forward; torch.export fails inside torch, and says so twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear.to(torch.float64)(x.double()).float()
        return y


@pytest.mark.parametrize(("model", "line"), [(Loop(), "for place in"), (Casting(), "self.linear.to(")])
def test_a_refusal_names_the_line_of_the_model_and_prints_nothing(
    tmp_path: Path, model: nn.Module, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RefusedError) as refusal:
        moeify.export_onnx(model, tmp_path / "net.onnx", example_inputs={"x": torch.randn(4, 7)})
    number = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if line in text)
    assert f"(in forward, {__file__}:{number})" in str(refusal.value)
    assert capfd.readouterr() == ("", "")


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, 21).sum(-1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Branching(), "in forward, .*test_trace.py:"), (Fixed(), "it works only where the batch of x is 4")],
)
def test_what_cannot_be_traced_is_refused_with_the_place(tmp_path: Path, model: nn.Module, reason: str) -> None:
    with pytest.raises(RefusedError, match=f"torch.export cannot trace {type(model).__name__}: .*{reason}"):
        moeify.export_onnx(model, tmp_path / "net.onnx", example_inputs={"x": torch.randn(4, 3, 7)})
    assert not list(tmp_path.iterdir())


def test_in_float32_a_trace_holds_no_half_precision_and_its_own_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 7)
            self.scale = nn.Buffer(torch.tensor(3.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x.to(torch.float32).to(x.dtype)) * self.scale
            z: Tensor = y + torch.zeros(7, dtype=torch.float16)
            return z

    model = Net().half()
    twin = copy.deepcopy(model).float()
    captured = capture(model, {"x": torch.randn(4, 7).half()})
    graph = to_onnx(captured.in_float32(twin)).graph
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    assert {value.dtype for value in values} <= {ir.DataType.FLOAT, ir.DataType.INT64, None}
    weight = graph.initializers["linear.weight"].const_value
    assert weight is not None and weight.raw.data_ptr() == twin.linear.weight.data_ptr()
    half = to_onnx(captured).graph  # the trace itself is as it was
    assert half.inputs[0].dtype == half.outputs[0].dtype == ir.DataType.FLOAT16
