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


class Rotary(nn.Module):
    """Multiplies pairs of features by complex numbers, each position's by its own, as DeepSeek-V2 does."""

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * torch.tensor([1.0, 0.1, 0.01])
        turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns[None]).flatten(-2)


class Drawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_a_model_that_draws_random_numbers_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"^Drawing draws random numbers"):
        moeify.export_onnx(Drawing(), tmp_path / "net.onnx", example_inputs={"x": torch.randn(4, 7)})


def test_complex_numbers_are_exported_as_pairs(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(4, 5, 2, 6)}
    assert moeify.export_onnx(Rotary(), tmp_path / "net.onnx", example_inputs=inputs).passed


@pytest.mark.parametrize(("model", "line"), [(Loop(), "for place in"), (Casting(), "self.linear.to(")])
def test_a_refusal_names_the_line_of_the_model_and_prints_nothing(
    tmp_path: Path, model: nn.Module, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RefusedError) as refusal:
        moeify.export_onnx(model, tmp_path / "net.onnx", example_inputs={"x": torch.randn(4, 7)})
    number = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if line in text)
    assert f"(in forward, {__file__}:{number})" in str(refusal.value)
    assert capfd.readouterr() == ("", "")
