"""The token-by-token routers differentiated, exported, compiled, on the meta device, and with no tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moeify.routing.routers import (
    Routing,
    gshard,
    hash_tokens,
    noisy_topk,
    router_init,
    router_logits,
    sigmoid_grouped,
    softmax_topk,
    switch,
)
from tests.moeify.routing.draw import randn, seeded


def noisy(logits: Tensor) -> Routing:
    return noisy_topk(logits, 0.1 * logits.flip(-1), 2, generator=seeded(5))


def grouped(logits: Tensor) -> Routing:
    return sigmoid_grouped(logits, 2, bias_E=torch.linspace(0, 0.1, 6).to(logits), groups=3, groups_kept=2)


ROUTERS: dict[str, Callable[[Tensor], Routing]] = {
    "softmax_topk": lambda logits: softmax_topk(logits, 2),
    "softmax_topk, not renormalised": lambda logits: softmax_topk(logits, 2, renormalize=False),
    "gshard": lambda logits: gshard(logits, generator=seeded(4)),
    "noisy_topk": noisy,
    "sigmoid_grouped": grouped,
    "switch": lambda x: switch(x, torch.eye(6).to(x), jitter=0.01, generator=seeded(3)),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_gradients(name: str) -> None:
    logits = randn(5, 6, seed=7, dtype=torch.float64).requires_grad_()

    def differentiable(logits: Tensor) -> tuple[Tensor, ...]:
        routing = ROUTERS[name](logits)
        return routing.weights_TK, routing.scores_TE, routing.logits_TE

    assert torch.autograd.gradcheck(differentiable, (logits,))


@pytest.mark.parametrize("name", ROUTERS)
def test_no_tokens(name: str) -> None:
    routing = ROUTERS[name](torch.zeros(0, 6))
    assert routing.expert_ids_TK.shape == routing.weights_TK.shape
    assert routing.expert_ids_TK.shape[0] == 0
    assert routing.scores_TE.shape == (0, 6)


def test_shapes_on_the_meta_device() -> None:
    logits = torch.zeros(11, 6, device="meta")
    for routing in (
        softmax_topk(router_logits(torch.zeros(11, 9, device="meta"), torch.zeros(6, 9, device="meta")), 2),
        gshard(logits),
        noisy_topk(logits, logits, 2),
        sigmoid_grouped(logits, 2, groups=3, groups_kept=2),
        switch(torch.zeros(11, 9, device="meta"), torch.zeros(6, 9, device="meta"), jitter=0.01),
        hash_tokens(
            torch.zeros(11, dtype=torch.int64, device="meta"), torch.zeros(5, dtype=torch.int64, device="meta"), 6
        ),
    ):
        assert routing.expert_ids_TK.is_meta
        assert routing.expert_ids_TK.shape == routing.weights_TK.shape
        assert routing.scores_TE.shape == routing.logits_TE.shape == (11, 6)


class Router(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(router_init((6, 13), 0, "weight"))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = router_logits(x, self.weight)
        if self.name == "softmax_topk":
            routing = softmax_topk(logits, 2)
        else:
            routing = sigmoid_grouped(logits, 2, bias_E=torch.linspace(0, 0.1, 6), groups=3, groups_kept=2)
        return routing.expert_ids_TK, routing.weights_TK, routing.scores_TE


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_grouped"])
def test_export_with_any_number_of_tokens(name: str) -> None:
    router = Router(name)
    program = torch.export.export(router, (randn(7, 13),), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    for tokens in (5, 31):
        x = randn(tokens, 13, seed=tokens)
        for exported, eager in zip(program.module()(x), router(x), strict=True):
            assert torch.equal(exported, eager)


@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_grouped"])
def test_compile_as_one_graph(name: str) -> None:
    router = Router(name)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    x = randn(7, 13)
    for traced, eager in zip(compiled(x), router(x), strict=True):
        assert torch.equal(traced, eager)
