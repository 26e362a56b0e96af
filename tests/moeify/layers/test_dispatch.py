"""The seam between the router's choice and the experts: another dispatcher is one object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moeify import routers
from moeify.config import MoEConfig
from moeify.kernels import ops
from moeify.layers.dispatch import LocalDispatcher, Sent
from moeify.measure import TOLERANCE
from moeify.routing.record import Routing
from tests.moeify.layers import make

CONFIGS = {
    "softmax": MoEConfig(6, 2),
    "dropped choices": MoEConfig(6, 3, capacity_factor=0.5),
    "attached losses": MoEConfig(6, 2, aux_loss=0.3, attach_losses=True),
    "shared experts": MoEConfig(6, 2, shared_experts=2),
    "expert choice": MoEConfig.expert_choice(6),
    "soft": MoEConfig(6, 1, router=routers.Soft(slots=3)),
}


class Split:
    """Sends one row and one weight for each choice that is kept, as a dispatcher over two devices does.

    The experts of the first half come first; choices that were dropped are sent nowhere.
    """

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.rows: list[int] = []  # of each half, in the last call

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Sent:
        tokens_R, choices_R = (routing.expert_ids_TK < self.experts).nonzero(as_tuple=True)
        ids_R = routing.expert_ids_TK[tokens_R, choices_R]
        order_R = ids_R.argsort(stable=True)
        tokens_R, choices_R, ids_R = tokens_R[order_R], choices_R[order_R], ids_R[order_R]
        first = int((ids_R < self.experts // 2).sum())
        self.rows = [first, len(ids_R) - first]
        return Sent(
            x_TH[tokens_R], ids_R[:, None], routing.weights_TK[tokens_R, choices_R][:, None], (tokens_R, len(x_TH))
        )

    def combine(self, y_RH: Tensor, sent: Sent) -> Tensor:
        state: Any = sent.state
        tokens_R, tokens = state
        out_TH: Tensor = y_RH.new_zeros(tokens, y_RH.shape[-1]).index_add(0, tokens_R, y_RH)
        return out_TH


def run(config: MoEConfig, split: bool) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    layer = make.layer(config, dtype=torch.float64)
    dispatcher = Split(config.experts)
    if split:
        layer.dispatcher = dispatcher
    x = make.inputs(3, 7, dtype=torch.float64).requires_grad_()
    out = layer(x)
    torch.autograd.backward(out.square().sum())
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return out, {**gradients, "x": x.grad}, dispatcher.rows


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dispatcher_that_splits_the_choices_gives_the_same_outputs_and_gradients(name: str) -> None:
    expected, gradients, _ = run(CONFIGS[name], split=False)
    out, found, rows = run(CONFIGS[name], split=True)
    assert all(rows) and sum(rows) > 0
    assert found.keys() == gradients.keys()
    for actual, wanted in ((out, expected), *((found[key], gradients[key]) for key in gradients)):
        assert (actual - wanted).abs().max() <= TOLERANCE["float64"] * wanted.abs().max()


def test_the_local_dispatcher_hands_on_what_it_gets() -> None:
    x, zeros = make.inputs(7), torch.zeros(7, 2)
    routing = Routing(zeros, zeros.long(), zeros, zeros)
    local = LocalDispatcher()
    sent = local.dispatch(x, routing)
    assert sent.x is x and sent.expert_ids is routing.expert_ids_TK and sent.weights is routing.weights_TK
    assert local.combine(x, sent) is x


def test_the_local_layer_calls_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    fused: Callable[..., Tensor] = ops.experts
    monkeypatch.setattr(ops, "experts", lambda x, *rest, **options: calls.append(x) or fused(x, *rest, **options))  # type: ignore[func-returns-value]
    layer, x = make.layer(MoEConfig(5, 2)), make.inputs(2, 3)
    layer(x)
    assert len(calls) == 1 and calls[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("training", [True, False])
def test_the_seam_adds_nothing_to_an_exported_graph(training: bool) -> None:
    layer = make.layer(MoEConfig(5, 2)).train(training)
    graph = torch.export.export(layer, (make.inputs(2, 3),), strict=False).graph
    (experts,) = graph.find_nodes(op="call_function", target=torch.ops.moeify.experts.default)
    (topk,) = graph.find_nodes(op="call_function", target=torch.ops.aten.topk.default)
    tokens, ids, weights = experts.all_input_nodes[:3]
    assert [node.op for node in tokens.all_input_nodes] == ["placeholder"]  # reshaped
    assert ids.args == (topk, 1)
    assert list(weights.users) == [experts]
    nodes = list(graph.nodes)
    after = {str(node.target).split(".")[1] for node in nodes[nodes.index(experts) + 1 :] if node.op == "call_function"}
    assert after <= {"_assert_tensor_metadata", "to", "reshape", "view", "dropout"}
