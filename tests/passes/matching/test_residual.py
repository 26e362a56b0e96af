from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.passes.matching.projection import find_projections
from moeify.passes.matching.residual import End, ResidualStreams, follows_choice
from moeify.tracing.stand_in import standing_in
from moeify.tracing.trace import trace
from tests.passes.blocks import HIDDEN, TOKENS, Function, Mlp, Model, find, only_reason, residual

Products = Callable[[Tensor, Tensor], Tensor]


def streams(m: Model, x: Tensor, *, joined: bool = True) -> Tensor:
    """Hyper-connections: the FFN reads a sum of streams, its result is spread over them, and a matrix mixes them."""
    h = torch.stack([x, 2 * x, -x, x / 2], dim=-2)
    weights = m.other(h.mean(-2)).sigmoid()
    y = m.mlps[0](m.norm((h * weights[..., :4, None]).sum(-2)))
    h = h if joined else m.other(h)
    h = m.other.weight[:4, :4].softmax(-1) @ h + y.unsqueeze(-2) * m.other.bias[:4, None]
    out: Tensor = h.sum(-2)
    return out


def spread(m: Model, x: Tensor, read: Products, write: Products, mix: Products) -> Tensor:
    """Hyper-connections with products: streams are read by weights, the result is written to them, they are mixed."""
    h = torch.stack([x, 2 * x, -x, x / 2], dim=-2)
    weights = m.other(h.mean(-2)).sigmoid()
    y = m.mlps[0](m.norm(read(weights[..., :4], h)))
    return mix((weights[..., :4, None] * weights[..., None, 4:8]).softmax(-1), h) + write(weights[..., 4:8], y)


def over_streams(m: Model, x: Tensor) -> Tensor:
    """Streams mixed by a linear layer, whose features are the streams."""
    h, mix = torch.stack([x, 2 * x, -x, x / 2], dim=-1), m.other.weight[:4, :4]
    y = m.mlps[0](m.norm(F.linear(h, mix[:1]).squeeze(-1)))
    return F.linear(h, mix) + F.linear(y.unsqueeze(-1), mix[:, :1])


JOINS: dict[str, Function] = {
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
    "a gated residual": lambda m, x: m.mlps[0](x) * m.other(x).sigmoid() + x * (1 - m.other(x).sigmoid()),
    "interpolated": lambda m, x: torch.lerp(x, m.mlps[0](m.norm(x)), m.other(x).sigmoid()),
    "interpolated, the other way": lambda m, x: torch.lerp(m.mlps[0](m.norm(x)), x, 0.3),
    "layer scale in one operator": lambda m, x: torch.addcmul(x, m.mlps[0](m.norm(x)), m.norm.weight),
    "a scaled stream in one operator": lambda m, x: torch.addcmul(m.mlps[0](m.norm(x)), x, m.norm.weight),
    "four streams, mixed by a matrix": lambda m, x: streams(m, x),
    "four streams, by einsum": lambda m, x: spread(
        m,
        x,
        lambda w, h: torch.einsum("btn,btnh->bth", w, h),
        lambda w, y: torch.einsum("...n, ...h -> ...nh", w, y),
        lambda w, h: torch.einsum("btnm,btmh->btnh", w, h),
    ),
    "four streams, by matmul": lambda m, x: spread(
        m,
        x,
        lambda w, h: (w.unsqueeze(-2) @ h).squeeze(-2),
        lambda w, y: w.unsqueeze(-1) @ y.unsqueeze(-2),
        lambda w, h: w @ h,
    ),
    "four streams, by a linear layer": over_streams,
    "the sum of a stack": lambda m, x: torch.einsum(
        "n,nbth->bth", m.other.bias[:2], torch.stack([m.mlps[0](m.norm(x)), x])
    ),
    "the mean of a stack": lambda m, x: torch.stack([x, m.mlps[0](m.norm(x))], -2).mean(2),
    "rows in a list": lambda m, x: x + m.mlps[0](m.norm(x).reshape(-1, HIDDEN)).view_as(x),
    "some rows only": lambda m, x: x.index_put((torch.tensor([0, 1]),), m.mlps[0](x[:2])) + x,
    "streams mixed before and after": lambda m, x: x + x.roll(1, 1) * m.mlps[0](x[:, :1] * 0.3 + x * 0.7),
    "a product on the residual": lambda m, x: x.softmax(1).transpose(1, 2).matmul(x).matmul(x.mT).mT + m.mlps[0](x),
    "chunked over positions": lambda m, x: x + torch.cat([m.mlps[0](c) for c in m.norm(x).split(2, 1)], 1),
    "cast for the products": lambda m, x: x + m.mlps[0](m.norm(x).to(torch.float64).to(torch.float32)),
}


@pytest.mark.parametrize("function", JOINS.values(), ids=JOINS)
def test_residual_connections_of_many_forms(function: Function) -> None:
    found = find(Model(function, Mlp()))
    assert [ffn.name for ffn in found.ffns] == ["mlps.0"], found.refused


ELSEWHERE: dict[str, Function] = {
    "a head": lambda m, x: m.mlps[0](m.norm(x.mean(1))),
    "a pooler": lambda m, x: m.mlps[0](x[:, 0]).tanh(),
    "a gate on the stream": lambda m, x: x + x * m.mlps[0](m.norm(x)).sigmoid(),
    "a scale on the stream": lambda m, x: x + x * m.mlps[0](m.norm(x)),
    "a scale on the stream in one operator": lambda m, x: torch.addcmul(x, x, m.mlps[0](m.norm(x))),
    "a gate between streams": lambda m, x: torch.lerp(x, 2 * x, m.mlps[0](m.norm(x))),
    "interpolated with something else": lambda m, x: torch.lerp(m.other(x), m.mlps[0](m.other(x)), 0.3),
    "other streams, mixed by a matrix": lambda m, x: streams(m, x, joined=False),
    "squeeze and excite": lambda m, x: x * m.mlps[0](x.mean(1, keepdim=True)).sigmoid() + x,
    "other streams, by einsum": lambda m, x: spread(
        m,
        x,
        lambda w, h: m.other(h.sum(-2)),
        lambda w, y: torch.einsum("btn,bth->btnh", w, y),
        lambda w, h: m.other(h),
    ),
    "an attention with its result": lambda m, x: (
        x + torch.einsum("bth,bsh->bts", m.mlps[0](x), m.other(x)).mean(-1, True)
    ),
    "a stack that is not summed": lambda m, x: torch.stack([x, m.mlps[0](m.norm(x))]).mean(2).tanh(),
    "added to something else": lambda m, x: m.other(x) + m.mlps[0](m.other(x)),
}


@pytest.mark.parametrize("function", ELSEWHERE.values(), ids=ELSEWHERE)
def test_what_never_meets_the_stream_again_is_refused(function: Function) -> None:
    found = find(Model(function, Mlp()))
    assert found.ffns == ()
    assert only_reason(found, "mlps.0.down") == "its result does not join the residual stream: a head, pooler or gate"


# A sum that only projections read: `factor * mlp(x)` is scaled by position encodings, or by a mask.
FACTORS: dict[str, tuple[Function, bool]] = {
    "values for each position and feature": (lambda m, x: m.other.weight.sin()[:TOKENS], False),
    "values for each position": (lambda m, x: m.other.weight.sin()[:TOKENS, :1], True),
    "values for each feature": (lambda m, x: m.other.weight.sin()[:1], True),
    "values for each feature, in one dimension": (lambda m, x: m.other.bias, True),
}


@pytest.mark.parametrize(("factor", "joins"), FACTORS.values(), ids=FACTORS)
def test_a_sum_that_is_projected_as_queries_and_keys_is_a_position_encoding(factor: Function, joins: bool) -> None:
    def run(m: Model, x: Tensor) -> Tensor:
        total = x + factor(m, x) * m.mlps[0](x)
        out: Tensor = x + m.other(total) * m.mlps[1](total).sum()
        return out

    found = find(Model(run, Mlp(), nn.Linear(HIDDEN, 7)))
    assert [ffn.name for ffn in found.ffns] == (["mlps.0"] if joins else [])


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


def test_experts_that_a_product_weighs_are_no_dense_ffns() -> None:
    def run(m: Model, x: Tensor) -> Tensor:
        kept = torch.zeros_like(scores := m.other(x)[..., :2]).scatter(-1, scores.topk(1).indices, 1.0)
        out: Tensor = x + torch.einsum("btn,nbth->bth", kept, torch.stack([mlp(m.norm(x)) for mlp in m.mlps]))
        return out

    found = find(Model(run, Mlp(), Mlp()))
    assert not found.ffns and "a router chooses its tokens" in only_reason(found, "mlps.1.down")


def test_a_norm_over_the_shared_and_the_routed_experts_together_is_no_router() -> None:
    class Normed(Router):
        def forward(self, x: Tensor) -> Tensor:
            both = self.mixed(x)
            result: Tensor = x + both * both.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
            return result

    found = find(Normed(dense=False))
    assert [(ffn.name, ffn.shared_expert) for ffn in found.ffns] == [("shared", True)]


def test_a_dense_ffn_after_an_moe_layer_is_dense() -> None:
    """What it reads goes back to the sum that the routed experts wrote, and a router picked positions before that."""
    found = find(nn.Sequential(Router(dense=False), residual()))
    assert [(ffn.name, ffn.shared_expert) for ffn in found.ffns] == [("0.shared", True), ("1.mlps.0", False)]


def test_an_ffn_on_positions_that_something_else_picks_is_dense() -> None:
    def run(m: Model, x: Tensor) -> Tensor:
        kept = torch.tensor([0, 2, 3], device=x.device)
        return x.index_add(1, kept, m.mlps[0](x[:, kept]))

    assert [ffn.name for ffn in find(Model(run, Mlp())).ffns] == []
    assert [ffn.name for ffn in find(Model(lambda m, x: x + run(m, x), Mlp())).ffns] == ["mlps.0"]


@pytest.mark.parametrize("picks", [False, True])
def test_what_could_not_be_traced_may_be_a_router(picks: bool) -> None:
    def run(m: Model, x: Tensor) -> Tensor:
        scores = m.mlps[1](x)
        weights = scores.softmax(-1)[..., :1] if picks else 1
        out: Tensor = x + weights * m.mlps[0](x)
        return out

    model = Model(run, Mlp(), nn.Linear(HIDDEN, 3))
    with standing_in([model.mlps[1]], lambda x: x):
        found = find(model)
    assert [ffn.name for ffn in found.ffns] == ([] if picks else ["mlps.0"])
    reason = "a router chooses its tokens: an expert of an MoE that the model already has"
    assert not picks or only_reason(found, "mlps.0.down") == reason


@pytest.mark.parametrize(
    ("function", "end"),
    [
        (lambda m, x: m.mlps[0](x), End.BOUNDARY),
        (lambda m, x: m.mlps[0](m.norm(x)), End.BOUNDARY),
        (lambda m, x: m.mlps[0](m.other(x)), End.ELSEWHERE),
        (lambda m, x: m.mlps[0](x).tanh(), End.ELSEWHERE),
        (lambda m, x: m.mlps[0](x) + x, End.JOINS),
    ],
)
def test_a_result_that_leaves_the_traced_part_may_join_outside(function: Function, end: End) -> None:
    graph = trace(Model(function, Mlp()), torch.zeros(2, TOKENS, HIDDEN)).graph
    projections = find_projections(graph)
    up, down = (next(p for p in projections.values() if p.weight == f"mlps.0.{name}.weight") for name in ("up", "down"))
    assert ResidualStreams(projections, {}).end_of(down.node, up.source) == (end, False)


def test_a_choice_is_looked_for_up_to_the_stream() -> None:
    graph = trace(Model(lambda m, x: m.norm(x).topk(3, -1).values.relu(), Mlp()), torch.zeros(2, TOKENS, HIDDEN)).graph
    output = graph.output_node().all_input_nodes[0]
    topk = next(node for node in graph.nodes if node.name == "topk")
    assert follows_choice([output], ())
    assert not follows_choice([output], {topk})
    assert not follows_choice(topk.all_input_nodes, ())
