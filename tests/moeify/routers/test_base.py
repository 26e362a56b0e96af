"""What holds for every router: start values, gradients, tracing, no tokens; and a router that is one new file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify.config import MoEConfig
from moeify.config.choice import words
from moeify.routers.expert_choice import expert_choice
from moeify.routers.gshard import gshard
from moeify.routers.hash import hash_tokens
from moeify.routers.noisy_topk import noisy_topk
from moeify.routers.sigmoid import sigmoid_grouped
from moeify.routers.sinkhorn import sinkhorn
from moeify.routers.softmax import softmax_topk
from moeify.routing.logits import router_init, router_logits
from moeify.routing.record import Routing, RoutingContext
from tests.moeify.routing.draw import randn

FUNCTIONS: dict[str, Callable[[Tensor], Routing]] = {
    "softmax": lambda logits: softmax_topk(logits, 2),
    "softmax, not renormalized": lambda logits: softmax_topk(logits, 2, renormalize=False),
    "gshard": gshard,
    "noisy_topk": lambda logits: noisy_topk(logits, 0.1 * logits.flip(-1), 2),
    "sigmoid": lambda logits: sigmoid_grouped(
        logits, 2, bias_E=torch.linspace(0, 0.1, 6).to(logits), n_group=3, topk_group=2
    ),
    "expert_choice": lambda logits: expert_choice(logits, 3),
    "sinkhorn, top-1": lambda logits: sinkhorn(logits, 1),
    "sinkhorn": lambda logits: sinkhorn(logits, 2),
}
CONFIGS: dict[str, MoEConfig] = {
    "softmax": MoEConfig(6, 2, granularity=2),
    "gshard": MoEConfig.gshard(6),
    "noisy_topk": MoEConfig.noisy_topk(6, 2, granularity=2),
    "sigmoid": MoEConfig.deepseek_v3(6, 2, router={"n_group": 3, "topk_group": 2}),
    "expert_choice": MoEConfig.expert_choice(6),
    "sinkhorn": MoEConfig(6, 2, router="sinkhorn"),
    "hash": MoEConfig(6, 1, router=moeify.routers.Hash(vocab_size=23)),
    "soft": MoEConfig(6, 2, router=moeify.routers.Soft(slots=3), granularity=2),
}


def test_every_router_is_here() -> None:
    assert set(words("moeify.routers")) == set(CONFIGS)
    assert {name.partition(",")[0] for name in FUNCTIONS} | {"hash", "soft"} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_start_values_are_the_state_dict_and_come_from_seed_and_path(name: str) -> None:
    config = CONFIGS[name]
    router = config.router.module(13, config, dtype=torch.bfloat16)
    start = config.router.start(config, 13, "layers.0.mlp")
    kinds = {"F32": torch.float32, "I64": torch.int64}
    expected = {key: (value.shape, kinds[value.stored("BF16")]) for key, value in start.items()}
    assert {key: (tuple(value.shape), value.dtype) for key, value in router.state_dict().items()} == expected
    moved = {key: value.dtype for key, value in router.to(torch.float16).state_dict().items()}
    assert moved == {key: dtype for key, (_, dtype) in expected.items()}
    again, elsewhere = (config.router.start(config, 13, path) for path in ("layers.0.mlp", "layers.1.mlp"))
    for key, value in start.items():
        built = value.build()
        assert tuple(built.shape) == value.shape
        assert built.equal(again[key].build())
        if key in {"weight", "slots", "table"}:
            assert not built.equal(elsewhere[key].build())


@pytest.mark.parametrize(
    ("name", "tensor", "rows"), [("softmax", "weight", 1), ("noisy_topk", "weight", 1), ("soft", "slots", 3)]
)
def test_experts_that_hold_the_shards_of_one_ffn_start_with_equal_rows(name: str, tensor: str, rows: int) -> None:
    config = CONFIGS[name]
    drawn_GFH = config.router.start(config, 13, "mlp")[tensor].build().view(3, 2, rows, 13)
    assert drawn_GFH[:, 0].equal(drawn_GFH[:, 1])
    expected = router_init((3 * rows, 13), 0, f"mlp.router.{tensor}")
    assert drawn_GFH[:, 0].reshape(-1, 13).equal(expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(name: str) -> None:
    logits = randn(5, 6, seed=7, dtype=torch.float64).requires_grad_()

    def differentiable(logits: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(4)
        routing = FUNCTIONS[name](logits)
        return routing.weights_TK, routing.scores_TE, routing.logits_TE

    assert torch.autograd.gradcheck(differentiable, (logits,))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("device", "tokens"), [("meta", 11), ("cpu", 0)])
def test_shapes(name: str, device: str, tokens: int) -> None:
    routing = FUNCTIONS[name](torch.zeros(tokens, 6, device=device))
    assert routing.expert_ids_TK.device.type == device
    assert routing.expert_ids_TK.shape == routing.weights_TK.shape
    assert routing.expert_ids_TK.shape[0] == tokens
    assert routing.scores_TE.shape == routing.logits_TE.shape == (tokens, 6)


@pytest.mark.parametrize("masked", [sinkhorn, expert_choice])
@pytest.mark.parametrize(("device", "tokens"), [("meta", 11), ("cpu", 0)])
def test_shapes_with_a_mask(masked: Callable[..., Routing], device: str, tokens: int) -> None:
    real = torch.ones(tokens, dtype=torch.bool, device=device)
    routing = masked(torch.zeros(tokens, 6, device=device), 2, mask_T=real)
    assert routing.expert_ids_TK.shape == routing.weights_TK.shape == (tokens, 6 if masked is expert_choice else 2)


def test_shapes_of_hash_routing_on_the_meta_device() -> None:
    ids, table = (torch.zeros(size, dtype=torch.int64, device="meta") for size in (11, 5))
    routing = hash_tokens(ids, table, 6)
    assert routing.expert_ids_TK.is_meta and routing.expert_ids_TK.shape == routing.weights_TK.shape
    assert routing.scores_TE.shape == routing.logits_TE.shape == (11, 6)


class Routed(nn.Module):
    """A router as a module that takes and returns tensors."""

    def __init__(self, name: str, training: bool) -> None:
        super().__init__()
        self.router: Any = CONFIGS[name].router.module(13, CONFIGS[name]).train(training)
        with torch.no_grad():
            self.router.weight.copy_(router_init((6, 13), 0, "weight"))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        routing = self.router(x, RoutingContext())
        return routing.expert_ids_TK, routing.weights_TK, routing.scores_TE


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["softmax", "sigmoid", "sinkhorn"])
def test_export_with_any_number_of_tokens(name: str, training: bool) -> None:
    module = Routed(name, training)
    program = torch.export.export(module, (randn(7, 13),), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    for tokens in (5, 31):
        x = randn(tokens, 13, seed=tokens)
        for exported, eager in zip(program.module()(x), module(x), strict=True):
            assert torch.equal(exported, eager)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["softmax", "sigmoid", "sinkhorn", "expert_choice"])
def test_compile_as_one_graph(name: str, training: bool) -> None:
    module = Routed(name, training)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = randn(7, 13)
    for traced, eager in zip(compiled(x), module(x), strict=True):
        assert torch.equal(traced, eager)


def test_jitter_multiplies_the_input_in_training_only() -> None:
    config = MoEConfig(6, 2, jitter=0.3)
    router, x = config.router.module(13, config), randn(7, 13)
    with torch.no_grad():
        router.get_parameter("weight").copy_(router_init((6, 13), 0, "weight"))
        plain = router_logits(x, router.get_parameter("weight"))
        torch.manual_seed(0)
        assert not torch.equal(router.train()(x).logits_TE, plain)
        assert torch.equal(router.eval()(x).logits_TE, plain)


NEW_ROUTER = """
from dataclasses import dataclass
from moeify.config.checks import Count
from moeify.routers.base import LinearRouter, Router
from moeify.routers.softmax import softmax_topk

class FirstOnlyRouter(LinearRouter):
    def __init__(self, options, hidden, config, zeros):
        super().__init__(options, hidden, config, zeros)
        self.options = options

    def route(self, x_TH, context):
        return softmax_topk(self.logits(x_TH)[:, : self.options.first], self.config.top_k)

@dataclass(frozen=True)
class FirstOnly(Router):
    builds = FirstOnlyRouter
    first: Count = 3
"""


def test_a_new_router_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first_only.py").write_text(NEW_ROUTER)
    monkeypatch.setattr(moeify.routers, "__path__", [*moeify.routers.__path__, str(tmp_path)])
    assert "first_only" in words("moeify.routers")
    config = MoEConfig(8, 2, router={"name": "first_only", "first": 4})
    assert config.router == moeify.routers.FirstOnly(first=4)
    assert MoEConfig.from_dict(config.to_dict()) == config and config.exact
    x = randn(2, 5, 36)
    model: Any = Block()
    before = model(x)
    moeify.convert(model, config, example_inputs=(x,))
    torch.testing.assert_close(model(x), before)
    assert int(model.ffn.record.routing.expert_ids_TK.max()) < 4


class Block(nn.Module):
    """A residual block with one FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(36, 57), nn.GELU(), nn.Linear(57, 36))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.ffn(x)
        return out
