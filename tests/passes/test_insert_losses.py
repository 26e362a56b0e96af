from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from moeify.config import MoEConfig
from moeify.conversion.graph import convert_graph
from moeify.layers import SparseMoE
from moeify.passes.base import PassResult
from moeify.passes.insert_losses import InsertLosses, call_with_loss, moe_calls
from moeify.routers import Soft
from tests.passes.blocks import HIDDEN, TOKENS, Mlp, exported, residual

CONFIG = MoEConfig(4, 2, z_loss=0.1)
X = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))


def sparse(*mlps: nn.Module, config: MoEConfig = CONFIG) -> fx.GraphModule:
    torch.manual_seed(0)
    return convert_graph(exported(residual(*mlps)), config)


def loss_of(layer: SparseMoE) -> Tensor:
    losses = layer.losses()
    return CONFIG.aux_loss * losses["balance"] + CONFIG.z_loss * losses["z"]


def test_the_result_and_the_sum_of_the_losses_are_returned() -> None:
    given = sparse(Mlp(), Mlp())
    result = InsertLosses()(given)
    out, loss = result.graph_module(X)
    assert result.modified
    assert torch.equal(out, given(X))
    layers = [each for each in given.modules() if isinstance(each, SparseMoE)]
    torch.testing.assert_close(loss, loss_of(layers[0]) + loss_of(layers[1]))
    assert loss.shape == () and loss.requires_grad


def test_the_graph_before_and_after() -> None:
    given = sparse()
    graph = InsertLosses()(given).graph_module.graph
    (call,) = graph.find_nodes(op="call_function", target=call_with_loss)
    (before,) = given.graph.find_nodes(op="call_module")
    layer, *given_to_it = call.all_input_nodes
    assert layer.target == "mlps.0"
    assert list(map(str, given_to_it)) == list(map(str, before.args))
    out, loss = call.users
    assert out.meta["val"].shape == before.meta["val"].shape
    returned = graph.output_node().args[0]
    assert isinstance(returned, tuple) and returned[-1] is loss


def test_a_graph_that_is_called_without_a_convention_returns_a_pair_too() -> None:
    class Root(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x) + x
            return out

    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, SparseMoE)

    root = Root(sparse().get_submodule("mlps.0"))
    given = fx.GraphModule(root, Leaves().trace(root))
    out, loss = InsertLosses()(given).graph_module(X)
    assert torch.equal(out, given(X))
    torch.testing.assert_close(loss, loss_of(root.layer))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["dense", "done before"])
def test_a_graph_whose_layers_all_return_their_loss_is_left_as_it_is(name: str) -> None:
    given = exported(residual()) if name == "dense" else InsertLosses()(sparse()).graph_module
    assert InsertLosses()(given) == PassResult(given, modified=False)


def test_a_router_that_has_nothing_to_balance_has_no_loss() -> None:
    given = sparse(config=MoEConfig(4, 1, router=Soft(slots=2)))
    assert len(moe_calls(given)) == 1
    _, loss = InsertLosses()(given).graph_module(X)
    assert loss.item() == 0


def test_padding_is_left_out_of_the_loss() -> None:
    layer = sparse().get_submodule("mlps.0")
    assert isinstance(layer, SparseMoE)
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    ids = torch.zeros_like(mask)
    _, whole = call_with_loss(layer, X, ids, mask)
    mask[1, 3:] = 0
    _, padded = call_with_loss(layer, X, ids, mask)
    _, rest = call_with_loss(layer, X[mask == 1])
    assert not torch.equal(padded, whole)
    torch.testing.assert_close(padded, rest)
