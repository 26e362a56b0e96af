"""Blocks as other libraries write them: diffusion transformers, timm, peft."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.passes.find_ffn import Inspection, find_ffns_in
from moeify.tracing.trace import trace

HIDDEN, INNER, TOKENS = 12, 31, 6


def find(model: nn.Module, *inputs: Tensor) -> Inspection:
    return find_ffns_in(trace(model, inputs or (torch.zeros(2, TOKENS, HIDDEN),)))


class FeedForward(nn.Module):
    """As diffusers writes it: a list of modules, GEGLU with one packed projection whose first half is the value."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(HIDDEN, 2 * INNER), nn.Dropout(0.0), nn.Linear(INNER, HIDDEN)])

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.net[0](x).chunk(2, dim=-1)
        out: Tensor = self.net[2](self.net[1](value * F.gelu(gate)))
        return out


class DiTBlock(nn.Module):
    """Shift, scale and gate from the time step, around the attention and around the FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(HIDDEN, 6 * HIDDEN))
        self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)
        self.ff = FeedForward()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        a, b, c, d, e, f = self.modulation(time)[:, None].chunk(6, dim=-1)
        h = self.norm(x) * (1 + b) + a
        x = x + c * self.attention(h, h, h, need_weights=False)[0]
        out: Tensor = x + f * self.ff(self.norm(x) * (1 + e) + d)
        return out


def test_modulated_blocks_of_diffusion_transformers() -> None:
    (ffn,) = find(DiTBlock(), torch.zeros(2, TOKENS, HIDDEN), torch.zeros(2, HIDDEN)).ffns
    assert (ffn.name, ffn.kind, ffn.activation) == ("ff", "glu", "gelu")
    assert ffn.gate_up_rows is not None
    assert ffn.gate_up_rows.gate == (0, INNER, 2 * INNER, 1)


class SingleStream(nn.Module):
    """Flux's single block: attention and MLP share the projection back, so there is no FFN to take out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, INNER)
        self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)
        self.out = nn.Linear(HIDDEN + INNER, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        attended = self.attention(h, h, h, need_weights=False)[0]
        out: Tensor = x + self.out(torch.cat([attended, F.gelu(self.up(h), approximate="tanh")], dim=-1))
        return out


def test_a_projection_back_that_attention_shares_is_refused() -> None:
    found = find(SingleStream())
    assert found.ffns == ()
    assert any(refusal.name == "out" and "or heads" in refusal.reason for refusal in found.refused)


class PoolFormerBlock(nn.Module):
    """timm's PoolFormer: 1x1 convolutions, group norm, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.GroupNorm(1, HIDDEN), nn.Parameter(torch.ones(HIDDEN, 1, 1))
        self.fc1, self.fc2 = nn.Conv2d(HIDDEN, INNER, 1), nn.Conv2d(INNER, HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.avg_pool2d(x, 3, 1, 1) - x
        out: Tensor = x + self.scale * self.fc2(F.gelu(self.fc1(self.norm(x))))
        return out


def test_convolutional_ffns_of_timm() -> None:
    (ffn,) = find(PoolFormerBlock(), torch.zeros(2, HIDDEN, 5, 7)).ffns
    assert (ffn.down.weight, ffn.down.axis, ffn.intermediate) == ("fc2.weight", -3, INNER)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(HIDDEN, INNER, 1), nn.Conv2d(INNER, HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        return x + x * gate


def test_squeeze_and_excite_is_refused() -> None:
    found = find(SqueezeExcite(), torch.zeros(2, HIDDEN, 5, 7))
    assert found.ffns == ()
    assert any(refusal.name == "expand" and "residual stream" in refusal.reason for refusal in found.refused)


class LoraLinear(nn.Module):
    """As peft wraps a layer: the base, plus a product of two narrow ones."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, 3, bias=False)
        self.lora_B = nn.Linear(3, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))
        return out


class Wrapped(nn.Module):
    def __init__(self, up: bool, down: bool) -> None:
        super().__init__()
        first, second = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)
        self.up = LoraLinear(first) if up else first
        self.down = LoraLinear(second) if down else second

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.silu(self.up(x)))
        return out


def test_layers_wrapped_by_lora_are_refused() -> None:
    for up, down, reason in (
        (True, False, "read different activations: up.base_layer and up.lora_B (an adapter? merge it first)"),
        (False, True, "merge it first"),
    ):
        found = find(Wrapped(up, down))
        assert found.ffns == ()
        assert any(reason in refusal.reason for refusal in found.refused), found.refused


class AdapterBlock(nn.Module):
    """An FFN, and Houlsby's adapter on its result with a residual connection of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)
        self.squeeze, self.spread = nn.Linear(HIDDEN, 3), nn.Linear(3, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(F.gelu(self.up(x)))
        out: Tensor = x + (h + self.spread(F.gelu(self.squeeze(h))))
        return out


def test_an_adapter_on_the_result_of_an_ffn_is_refused_and_the_ffn_is_found() -> None:
    found = find(AdapterBlock())
    assert [ffn.down.weight for ffn in found.ffns] == ["down.weight"]
    assert any(refusal.name == "spread" and "an adapter" in refusal.reason for refusal in found.refused)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(INNER, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(F.relu(F.linear(x, self.w)), self.w.t())


def test_an_ffn_that_projects_back_with_the_same_weight_is_refused() -> None:
    found = find(Tied())
    assert found.ffns == ()
    assert any("share the weight w" in refusal.reason for refusal in found.refused)


class WeighedBefore(nn.Module):
    """A mixture by hand: the router's k best weigh the experts' hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 3)
        self.up = nn.ModuleList(nn.Linear(HIDDEN, INNER) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(INNER, HIDDEN) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).sigmoid()
        values, chosen = scores.topk(2, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, chosen, values)
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            x = x + down(F.gelu(up(x)) * weights[..., expert : expert + 1])
        return x


def test_a_choice_among_experts_is_no_activation() -> None:
    assert find(WeighedBefore()).ffns == ()


def test_activations_that_torch_loses_in_a_copy_are_seen() -> None:
    layer = nn.TransformerDecoderLayer(HIDDEN, 2, INNER, activation=nn.GELU(), batch_first=True)
    (ffn,) = find(layer, *[torch.zeros(2, TOKENS, HIDDEN)] * 2).ffns
    assert ffn.activation == "gelu"
