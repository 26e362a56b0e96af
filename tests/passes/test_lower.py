from __future__ import annotations

import pytest
import torch
from torch import fx

from moeify.config import MoEConfig
from moeify.conversion.graph import convert_graph
from moeify.measure import TOLERANCE
from moeify.passes.base import PassResult
from moeify.passes.insert_losses import InsertLosses
from moeify.passes.lower import IMPLEMENTATIONS, Lower
from tests.passes.blocks import CONFIG, HIDDEN, TOKENS, Mlp, Model, exported, residual, snapshot, twice

X = torch.randn(2, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))
SINKHORN = MoEConfig(4, 2, router="sinkhorn")  # a router with a block `with torch.no_grad()`


def sparse(config: MoEConfig = CONFIG) -> fx.GraphModule:
    torch.manual_seed(0)
    return convert_graph(exported(residual(Mlp(), Mlp())), config)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layers_become_operators_that_name_what_runs_them(implementation: str) -> None:
    given = sparse()
    result = Lower(implementation)(given)
    graph = result.graph_module.graph
    assert result.modified and not graph.find_nodes(op="call_module")
    experts = graph.find_nodes(op="call_function", target=torch.ops.moeify.experts.default)
    assert [node.args[-1] for node in experts] == ([] if implementation == "reference" else [implementation] * 2)
    assert any("topk" in node.name for node in graph.nodes)
    assert set(result.graph_module.state_dict()) == set(given.state_dict())
    if implementation != "triton":
        torch.testing.assert_close(result.graph_module(X), given(X), rtol=TOLERANCE["float32"], atol=1e-6)


def test_an_implementation_that_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="implementation is 'fast': expected one of auto, cpu, triton, reference"):
        Lower("fast")


@pytest.mark.parametrize("config", [CONFIG, SINKHORN], ids=["plain", "with a block"])
@pytest.mark.parametrize("losses", [False, True])
def test_the_layers_of_the_given_graph_stay_as_they_are(config: MoEConfig, losses: bool) -> None:
    given = sparse(config)
    if losses:
        given = InsertLosses()(given).graph_module
    expected, before = given(X), snapshot(given)
    lowered = Lower()(given).graph_module
    assert snapshot(given) == before
    torch.testing.assert_close(lowered(X), expected)


def test_layers_are_written_out_in_the_mode_that_they_are_in() -> None:
    given = sparse(SINKHORN)
    for training in (False, True):
        given.train(training)
        lowered = Lower()(given).graph_module
        torch.testing.assert_close(lowered(X), given(X))
        assert len(lowered.graph.nodes) == len(Lower()(given).graph_module.graph.nodes)
    assert str(Lower()(given.eval()).graph_module.graph) != str(lowered.graph)


def test_a_layer_that_is_called_twice_is_written_out_twice() -> None:
    given = convert_graph(exported(Model(twice, Mlp())), SINKHORN).train()
    lowered = Lower()(given).graph_module
    experts = lowered.graph.find_nodes(op="call_function", target=torch.ops.moeify.experts.default)
    assert len(experts) == 2
    torch.testing.assert_close(lowered(X), given(X))


def test_other_positions_than_those_of_the_trace() -> None:
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(residual().eval(), (X,), dynamic_shapes=(free,))
    given = convert_graph(program, CONFIG)
    lowered, x = Lower()(given).graph_module, torch.randn(3, 7, HIDDEN)
    torch.testing.assert_close(lowered(x), given(x))


def test_a_graph_without_layers_is_left_as_it_is() -> None:
    given = exported(residual())
    assert Lower()(given) == PassResult(given, modified=False)
