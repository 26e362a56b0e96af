from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.passes.find_ffn import Inspection, find_ffns_in
from moeify.tracing.trace import trace
from tests.moeify import tiny

HIDDEN, INNER, TOKENS = 10, 23, 5


def find(model: nn.Module, *shape: int) -> Inspection:
    return find_ffns_in(trace(model, torch.zeros(shape or (2, TOKENS, HIDDEN))))


def only_reason(found: Inspection, name: str) -> str:
    (reason,) = {refusal.reason for refusal in found.refused if refusal.name == name}
    return reason


# The architectures of `tiny`: how many, kind, activation, and where gate and up rows lie (projection, start, stop).
Rows = tuple[int, int, int]
ARCHITECTURES: dict[str, tuple[int, str, str, Rows | None, Rows]] = {
    "llama": (3, "glu", "silu", (0, 0, 57), (1, 0, 57)),
    "mistral": (3, "glu", "silu", (0, 0, 57), (1, 0, 57)),
    "qwen2": (3, "glu", "silu", (0, 0, 57), (1, 0, 57)),
    "qwen3": (3, "glu", "silu", (0, 0, 57), (1, 0, 57)),
    "gemma": (3, "glu", "gelu_tanh", (0, 0, 57), (1, 0, 57)),
    "phi3": (3, "glu", "silu", (0, 0, 57), (0, 57, 114)),
    "gpt2": (3, "mlp", "gelu_tanh", None, (0, 0, 57)),
    "opt": (3, "mlp", "relu", None, (0, 0, 57)),
    "gpt_neox": (3, "mlp", "gelu", None, (0, 0, 57)),
    "t5": (3, "mlp", "relu", None, (0, 0, 57)),
    "t5_gated": (3, "glu", "gelu_tanh", (0, 0, 57), (1, 0, 57)),
    "bert": (3, "mlp", "gelu", None, (0, 0, 57)),
    "vit": (3, "mlp", "gelu", None, (0, 0, 57)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_architectures(name: str) -> None:
    count, kind, activation, gate, up = ARCHITECTURES[name]
    found = find_ffns_in(trace(tiny.build(name)))
    assert len(found.ffns) == count
    for ffn in found.ffns:
        assert (ffn.kind, ffn.activation) == (kind, activation)
        assert (ffn.hidden, ffn.intermediate) == (tiny.HIDDEN, tiny.INTERMEDIATE)
        assert ffn.gate_up_rows is not None
        assert (ffn.gate_up_rows.gate and ffn.gate_up_rows.gate[:3]) == gate
        assert ffn.gate_up_rows.up[:3] == up
        assert len(ffn.calls) == 1 and not ffn.shared_expert
    assert len({ffn.down.weight for ffn in found.ffns}) == count


class Mlp(nn.Module):
    def __init__(self, hidden: int = HIDDEN, inner: int = INNER) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Model(nn.Module):
    """Any function of x and one or more MLPs."""

    mlps: Any

    def __init__(self, function: Callable[..., Tensor], *mlps: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.mlps = nn.ModuleList(mlps)
        self.norm, self.other = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


FOUND: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "pre-norm": lambda m, x: x + m.mlps[0](m.norm(x)),
    "post-norm": lambda m, x: m.norm(x + m.mlps[0](x)),
    "norm of the result": lambda m, x: x + m.norm(m.mlps[0](x)),
    "subtracted": lambda m, x: x - m.mlps[0](x),
    "scaled residual": lambda m, x: 0.5 * x + 0.3 * m.mlps[0](x),
    "layer scale": lambda m, x: x + m.norm.weight * m.mlps[0](x),
    "beside another branch": lambda m, x: x + m.other(m.norm(x)) + m.mlps[0](m.norm(x)),
    "another branch first": lambda m, x: (m.other(x) + m.mlps[0](x)) + x,
    "modulated and gated": lambda m, x: (
        x + m.other(x.mean(1, keepdim=True)) * m.mlps[0](m.norm(x) * (1 + m.other(x[:, :1])) + m.other(x[:, 1:2]))
    ),
    "a gate of its own": lambda m, x: x + m.other(x).sigmoid() * m.mlps[0](m.norm(x)),
    "rows in a list": lambda m, x: x + m.mlps[0](m.norm(x).reshape(-1, HIDDEN)).view_as(x),
    "some rows only": lambda m, x: x.index_put((torch.tensor([0, 1]),), m.mlps[0](x[:2])) + x,
    "streams mixed before and after": lambda m, x: x + x.roll(1, 1) * m.mlps[0](x[:, :1] * 0.3 + x * 0.7),
    "a product on the residual": lambda m, x: x.softmax(1).transpose(1, 2).matmul(x).matmul(x.mT).mT + m.mlps[0](x),
    "chunked over positions": lambda m, x: x + torch.cat([m.mlps[0](c) for c in m.norm(x).split(2, 1)], 1),
    "cast for the products": lambda m, x: x + m.mlps[0](m.norm(x).to(torch.float64).to(torch.float32)),
}


@pytest.mark.parametrize("function", FOUND.values(), ids=FOUND)
def test_residual_connections_of_many_forms(function: Callable[[Model, Tensor], Tensor]) -> None:
    found = find(Model(function, Mlp()))
    assert [ffn.name for ffn in found.ffns] == ["mlps.0"], found.refused


LOOK_ALIKES: dict[str, tuple[Callable[[Model, Tensor], Tensor], str]] = {
    "a head": (lambda m, x: m.mlps[0](m.norm(x.mean(1))), "does not join the residual stream"),
    "a pooler": (lambda m, x: m.mlps[0](x[:, 0]).tanh(), "does not join the residual stream"),
    "a gate on the stream": (lambda m, x: x + x * m.mlps[0](m.norm(x)).sigmoid(), "does not join the residual stream"),
    "a scale on the stream": (lambda m, x: x + x * m.mlps[0](m.norm(x)), "does not join the residual stream"),
    "squeeze and excite": (lambda m, x: x * m.mlps[0](x.mean(1, keepdim=True)).sigmoid() + x, "does not join"),
    "added to something else": (lambda m, x: m.other(x) + m.mlps[0](m.other(x)), "does not join the residual stream"),
    "a scale on position encodings": (
        lambda m, x: x + m.other(q := x + m.other.weight.sin()[:TOKENS] * m.mlps[0](x)) * m.mlps[1].up(q).sum(),
        "does not join the residual stream",
    ),
    "used twice": (lambda m, x: x + m.mlps[0].down(u := m.mlps[0].up(x).relu()) + u.sum(), "is also used by"),
    "an adapter beside its projection back": (
        lambda m, x: x + m.mlps[0].down(u := m.mlps[0].up(x).relu()) + m.mlps[1].down(u),
        "mlps.1.down projects its intermediate value too",
    ),
    "cross-attention's products": (
        lambda m, x: x + m.mlps[0].down(m.mlps[0].up(x).relu() * m.mlps[1].up(x.roll(1, 1))),
        "read different activations: mlps.0.up and mlps.1.up",
    ),
    "no nonlinearity": (lambda m, x: x + m.mlps[0].down(2 * m.mlps[0].up(x) - 1), "no nonlinearity"),
    "classes fed back": (
        lambda m, x: x + m.mlps[0].down(m.mlps[0].up(x).softmax(-1)),
        "a softmax over its intermediate values",
    ),
    "positions mixed inside": (
        lambda m, x: x + m.mlps[0].down(m.mlps[0].up(x).relu().cumsum(1) * m.mlps[0].up(x)),
        "`cumsum` is taken over another dimension than the features",
    ),
}


@pytest.mark.parametrize(("function", "reason"), LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alikes_are_refused_with_the_reason(function: Callable[[Model, Tensor], Tensor], reason: str) -> None:
    found = find(Model(function, Mlp(), Mlp()))
    assert found.ffns == ()
    assert reason in only_reason(found, "mlps.0.down")


def test_a_refusal_names_the_node_and_the_module_at_which_the_match_stopped() -> None:
    found = find(Model(lambda m, x: x + m.mlps[0](m.norm(x)).tanh(), Mlp()))
    (refusal,) = [refusal for refusal in found.refused if refusal.name == "mlps.0.down"]
    assert (refusal.name, refusal.where) == ("mlps.0.down", "mlps.0.down")
    assert refusal.node.startswith("linear")


def test_a_narrow_hidden_layer_is_an_adapter() -> None:
    found = find(Model(lambda m, x: x + m.mlps[0](x), Mlp(inner=2)))
    assert found.ffns == ()
    assert "bottleneck" in only_reason(found, "mlps.0.down")


class Mixer(nn.Module):
    """MLP-Mixer's block: an MLP over the positions, then one over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.tokens, self.channels = Mlp(TOKENS, 9), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.channels(self.norm(x))
        return out


def test_token_mixing_is_no_ffn_and_channel_mixing_is() -> None:
    found = find(Mixer())
    assert [ffn.name for ffn in found.ffns] == ["channels"]
    assert "token mixing" in only_reason(found, "tokens.down")


class ConvMlp(nn.Module):
    """1x1 convolutions over an image, after a depthwise convolution (as ConvNeXt and PoolFormer write it)."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.mix = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)
        self.up = nn.Conv2d(HIDDEN, INNER * (1 + gated), 1)
        self.down = nn.Conv2d(INNER, HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.up(self.mix(x))
        gate, up = z.chunk(2, 1) if self.gated else (z, 1)
        out: Tensor = x + self.down(F.silu(gate) * up)
        return out


@pytest.mark.parametrize("gated", [False, True])
def test_1x1_convolutions_are_projections_of_channels(gated: bool) -> None:
    (ffn,) = find(ConvMlp(gated), 2, HIDDEN, 6, 7).ffns
    assert (ffn.kind, ffn.activation, ffn.intermediate) == ("glu" if gated else "mlp", "silu", INNER)
    assert ffn.down.axis == -3
    z = torch.randn(3, 4, INNER * (1 + gated))  # the region takes rows in the last dimension
    expected = F.silu(z[..., :INNER]) * (z[..., INNER:] if gated else 1)
    torch.testing.assert_close(ffn.region(z), expected)


class Functional(nn.Module):
    """Weights held as bare parameters, products written out."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.zeros(HIDDEN, INNER)), nn.Parameter(torch.zeros(INNER))
        self.w2 = nn.Parameter(torch.zeros(HIDDEN, INNER))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear((x @ self.w1 + self.b1).relu(), self.w2)


def test_bare_parameters() -> None:
    (ffn,) = find(Functional()).ffns
    assert ffn.parameters == ("w1", "b1", "w2")
    assert (ffn.ups[0].transposed, ffn.down.transposed, ffn.activation) == (True, False, "relu")


def test_layers_that_share_an_ffn_have_one_that_is_called_often() -> None:
    def twice(m: Model, x: Tensor) -> Tensor:
        x = x + m.mlps[0](x)
        out: Tensor = x + m.mlps[0](m.other(x) + x)
        return out

    (ffn,) = find(Model(twice, Mlp())).ffns
    assert len(ffn.calls) == 2


def test_a_weight_that_something_else_uses_is_left_alone() -> None:
    found = find(Model(lambda m, x: x + m.mlps[0](x) + F.linear(m.other(x), m.mlps[0].down.weight.t()).sum(), Mlp()))
    assert found.ffns == ()
    assert "its weight mlps.0.down.weight is also used elsewhere" in {refusal.reason for refusal in found.refused}


class Router(nn.Module):
    """Two experts of which each token takes one, and one that every token takes."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        self.gate, self.experts, self.shared = nn.Linear(HIDDEN, 2), nn.ModuleList([Mlp(), Mlp()]), Mlp()

    def mixed(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if self.dense:
                out = out + expert(x) * (weights * (chosen == number))
            else:
                where = torch.where(chosen.squeeze(-1) == number)
                out = out.index_put(where, expert(x[where]) * weights[where], accumulate=True)
        result: Tensor = out + self.shared(x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixed(x)


@pytest.mark.parametrize("dense", [False, True])
def test_routed_experts_are_told_apart_from_the_shared_one(dense: bool) -> None:
    found = find(Router(dense))
    assert [(ffn.name, ffn.shared_expert) for ffn in found.ffns] == [("shared", True)]
    assert "a router chooses its tokens" in only_reason(found, "experts.1.down")


def test_a_norm_over_the_shared_and_the_routed_experts_together_is_no_router() -> None:
    class Normed(Router):
        def forward(self, x: Tensor) -> Tensor:
            both = self.mixed(x)
            result: Tensor = x + both * both.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
            return result

    found = find(Normed(dense=False))
    assert [(ffn.name, ffn.shared_expert) for ffn in found.ffns] == [("shared", True)]


def test_a_lone_mlp_is_refused_and_a_stack_of_layers_is_not() -> None:
    assert "only one of its kind" in only_reason(find(Mlp()), "down")


def test_the_graph_is_not_changed() -> None:
    gm = trace(Model(lambda m, x: x + m.mlps[0](x), Mlp()), torch.zeros(2, 5, HIDDEN))
    before = str(gm.graph)
    find_ffns_in(gm)
    assert str(gm.graph) == before


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_layers_of_torch(layer: Callable[..., nn.Module], norm_first: bool) -> None:
    module = layer(HIDDEN, 2, INNER, batch_first=True, norm_first=norm_first, activation="gelu")
    x = torch.zeros(2, TOKENS, HIDDEN)
    found = find_ffns_in(trace(module, (x,) if isinstance(module, nn.TransformerEncoderLayer) else (x, x)))
    assert [(ffn.activation, ffn.down.weight) for ffn in found.ffns] == [("gelu", "linear2.weight")]


def test_blocks_without_gradients_and_with_autocast_are_looked_into() -> None:
    def guarded(m: Model, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x + m.mlps[0](x)
        with torch.autocast("cpu", enabled=False):
            out: Tensor = x + m.mlps[1](x)
        return out

    assert [ffn.name for ffn in find(Model(guarded, Mlp(), Mlp())).ffns] == ["mlps.0", "mlps.1"]


def test_under_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    found = find(Model(lambda m, x: x + checkpoint(m.mlps[0], m.norm(x), use_reentrant=False), Mlp()))
    assert [ffn.name for ffn in found.ffns] == ["mlps.0"]
