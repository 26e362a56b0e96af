from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moeify.passes.find_ffn import find_ffns_in
from moeify.tracing.trace import UNTRACED, trace

HIDDEN, INNER = 10, 23


class Attention(nn.Module):
    """Leaves the graph: only a stand-in gets past it."""

    def __init__(self, tuples: bool) -> None:
        super().__init__()
        self.query, self.out, self.tuples = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN), tuples

    def forward(self, x: Tensor, lengths: Tensor) -> object:
        mixed = self.out(torch.as_tensor(self.query(x).numpy()) * len(lengths.tolist()))
        return (mixed, None) if self.tuples else mixed


class Layer(nn.Module):
    """An FFN held directly in a layer whose attention does not trace."""

    def __init__(self, tuples: bool = True) -> None:
        super().__init__()
        self.attention, self.norm = Attention(tuples), nn.LayerNorm(HIDDEN)
        self.fc1, self.fc2 = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mixed = self.attention(self.norm(x), lengths)
        x = x + (mixed[0] if self.attention.tuples else mixed)
        out: Tensor = x + self.fc2(self.fc1(self.norm(x)).relu())
        return out


class Gate(Layer):
    """What does not trace weighs the result: it may be a router."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        weight, _ = self.attention(x, lengths)
        out: Tensor = x + weight * self.fc2(self.fc1(x).relu())
        return out


class Head(Layer):
    """An MLP that reads what does not trace, and is added to what that was made from."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mixed, _ = self.attention(x, lengths)
        out: Tensor = x + self.fc2(self.fc1(mixed).relu())
        return out


@pytest.mark.parametrize("tuples", [True, False])
def test_an_ffn_beside_an_attention_that_does_not_trace_is_found(tuples: bool) -> None:
    gm = trace(nn.ModuleDict({"only": Layer(tuples)}))
    (ffn,) = find_ffns_in(gm).ffns
    assert (ffn.name, ffn.down.weight) == ("only", "only.fc2.weight")
    assert {"only", "only.attention"} <= set(gm.meta[UNTRACED])


@pytest.mark.parametrize("layer", [Gate, Head])
def test_a_guess_makes_no_ffn(layer: type[Layer]) -> None:
    found = find_ffns_in(trace(nn.ModuleDict({"only": layer()})))
    assert found.ffns == ()
    assert "only.fc2" in {refusal.name for refusal in found.refused}


def test_the_module_stays_itself() -> None:
    model = nn.ModuleDict({"only": Layer()})
    trace(model)
    assert "forward" not in vars(model["only"].attention)
