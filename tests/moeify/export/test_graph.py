from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify.errors import RefusedError


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
