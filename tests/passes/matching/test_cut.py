from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.passes.find_ffn import Inspection, find_ffns_in
from moeify.tracing.trace import trace

HIDDEN, INNER, TOKENS = 10, 23, 5


class Packed(nn.Module):
    """A gated FFN with gate and up in one projection, taken apart by `region`."""

    def __init__(self, region: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.region = nn.Linear(HIDDEN, 2 * INNER), nn.Linear(INNER, HIDDEN), region

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.region(self.up(x)))
        return out


def find(region: Callable[[Tensor], Tensor]) -> Inspection:
    return find_ffns_in(trace(Packed(region), torch.zeros(2, TOKENS, HIDDEN)))


def halves(z: Tensor) -> Tensor:
    return z.view(*z.shape[:-1], 2, -1)


def pairs(z: Tensor) -> Tensor:
    return z.view(*z.shape[:-1], -1, 2)


def glu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


FIRST, SECOND = (0, 0, INNER, 1), (0, INNER, 2 * INNER, 1)
EVEN, ODD = (0, 0, 2 * INNER, 2), (0, 1, 2 * INNER, 2)
# What the code writes, and where gate and up rows lie: (projection, start, stop, step).
Rows = tuple[int, int, int, int]
SPLITS: dict[str, tuple[Callable[[Tensor], Tensor], Rows, Rows]] = {
    "halves, indexed": (lambda z: glu(halves(z)[..., 0, :], halves(z)[..., 1, :]), FIRST, SECOND),
    "halves, the gate last": (lambda z: glu(halves(z)[..., 1, :], halves(z)[..., 0, :]), SECOND, FIRST),
    "halves, unbound": (lambda z: glu(*halves(z).unbind(-2)), FIRST, SECOND),
    "halves, chunked": (lambda z: glu(*halves(z).chunk(2, -2)).squeeze(-2), FIRST, SECOND),
    "halves, moved to the front": (lambda z: glu(*halves(z).permute(2, 0, 1, 3).unbind(0)), FIRST, SECOND),
    "halves, copied on the way": (lambda z: glu(*halves(z).movedim(-2, 0).contiguous().unbind(0)), FIRST, SECOND),
    "pairs, indexed": (lambda z: glu(pairs(z)[..., 0], pairs(z)[..., 1]), EVEN, ODD),
    "pairs, unbound": (lambda z: glu(*pairs(z).unbind(-1)[::-1]), ODD, EVEN),
    "pairs, chunked": (lambda z: glu(*(half.flatten(-2) for half in pairs(z).chunk(2, -1))), EVEN, ODD),
    "every second": (lambda z: glu(z[..., ::2], z[..., 1::2]), EVEN, ODD),
}


@pytest.mark.parametrize(("region", "gate", "up"), SPLITS.values(), ids=SPLITS)
def test_rows_taken_apart_by_reshapes(region: Callable[[Tensor], Tensor], gate: Rows, up: Rows) -> None:
    (ffn,) = find(region).ffns
    assert ffn.gate_up_rows is not None
    assert (ffn.kind, ffn.activation, ffn.intermediate) == ("glu", "silu", INNER)
    assert (ffn.gate_up_rows.gate, ffn.gate_up_rows.up) == (gate, up)
    z = torch.randn(2, TOKENS, 2 * INNER)
    torch.testing.assert_close(ffn.region(z), region(z))
    assert ffn.region(z[0]).shape == (TOKENS, INNER)  # rows in a list are enough


NOT_SLICES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "positions in another order": (lambda z: glu(*halves(z.transpose(0, 1).reshape(z.shape)).unbind(-2)), "unbind"),
    "halves of two positions": (lambda z: glu(z[..., :INNER], z.roll(1, 1)[..., INNER:]), "roll"),
    "halves summed": (lambda z: halves(z).tanh().sum(-2), "sum"),
    "parts that overlap": (lambda z: glu(z.unfold(-1, INNER, INNER)[..., 0, :], z[..., INNER:]), "select"),
}


@pytest.mark.parametrize(("region", "stopped_at"), NOT_SLICES.values(), ids=NOT_SLICES)
def test_what_is_no_slice_of_each_row(region: Callable[[Tensor], Tensor], stopped_at: str) -> None:
    found = find(region)
    assert found.ffns == ()
    (reason,) = [refusal.reason for refusal in found.refused if refusal.name == "down"]
    assert f"`{stopped_at}" in reason


def test_taking_halves_apart_is_no_nonlinearity() -> None:
    found = find(lambda z: halves(z)[..., 0, :] - halves(z)[..., 1, :])
    assert found.ffns == ()
    (reason,) = [refusal.reason for refusal in found.refused if refusal.name == "down"]
    assert "no nonlinearity" in reason


def test_channels_are_cut_too() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1)
            self.up, self.down = nn.Conv2d(HIDDEN, 2 * INNER, 1), nn.Conv2d(INNER, HIDDEN, 1)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.up(self.mix(x)).unflatten(1, (2, -1)).unbind(1)
            out: Tensor = x + self.down(glu(gate, up))
            return out

    (ffn,) = find_ffns_in(trace(Conv(), torch.zeros(2, HIDDEN, 6, 7))).ffns
    assert ffn.gate_up_rows is not None and (ffn.gate_up_rows.gate, ffn.gate_up_rows.up) == (FIRST, SECOND)


def test_symbolic_sizes() -> None:
    shape = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    example = torch.zeros(3, TOKENS, HIDDEN)
    model = Packed(lambda z: glu(halves(z)[..., 0, :], halves(z)[..., 1, :]))
    program = torch.export.export(model, (example,), dynamic_shapes=shape)
    (ffn,) = find_ffns_in(program.module(check_guards=False)).ffns
    assert ffn.activation == "silu"
