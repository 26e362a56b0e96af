"""What InsertMoE refuses: each case starts from a graph and a plan that it takes, and changes one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from moeify.config import MoEConfig
from moeify.errors import RefusedError
from moeify.passes.find_ffn import FindFFN
from moeify.passes.insert_moe import InsertMoE
from moeify.plan import Plan
from moeify.routers import Hash
from tests.passes.blocks import HIDDEN, INTERMEDIATE, Mlp, Model, exported, planned, residual, snapshot

HASH = MoEConfig(4, 1, router=Hash(vocab_size=17))


def test_the_plan_of_a_graph_is_taken() -> None:
    given = exported(residual())
    assert InsertMoE(planned(given))(given).modified


def refused(given: fx.GraphModule, plan: Plan) -> str:
    """The refusal, after which the graph is as it was."""
    before = snapshot(given)
    with pytest.raises(RefusedError) as refusal:
        InsertMoE(plan)(given)
    assert snapshot(given) == before
    return str(refusal.value)


def test_refused_without_a_search() -> None:
    given = exported(residual())
    plan = planned(given)
    assert "run FindFFN first" in refused(exported(residual()), plan)
    assert InsertMoE(plan)(FindFFN()(exported(residual())).graph_module).modified


def test_refused_when_the_graph_was_changed_after_the_search() -> None:
    given = exported(residual())
    plan = planned(given)
    gelu = next(node for node in given.graph.nodes if node.name == "gelu")
    with given.graph.inserting_before(gelu):
        relu = given.graph.call_function(torch.ops.aten.relu.default, gelu.args)
    gelu.replace_all_uses_with(relu)
    given.graph.erase_node(gelu)
    assert refused(given, plan) == "the graph was changed since FindFFN searched it: run FindFFN again"


def test_refused_with_what_was_found_in_another_graph() -> None:
    given, other = exported(residual()), exported(residual())
    plan = planned(given)
    other.meta.update(given.meta)
    assert "run FindFFN again" in refused(other, plan)


def test_refused_where_the_plan_names_what_the_graph_has_not() -> None:
    given = exported(residual())
    plan = planned(given)
    (site,) = plan.sites
    other = replace(site, path="mlps.7", down=replace(site.down, parameter="mlps.7.down.weight"))
    text = refused(given, replace(plan, sites=(site, other)))
    assert text.startswith("mlps.7: the graph has no FFN that ends in mlps.7.down.weight")


def test_refused_where_no_input_holds_the_token_ids() -> None:
    given = exported(residual())
    assert refused(given, planned(given, HASH)).startswith("mlps.0: hash routing needs the token ids")


def test_refused_where_the_list_of_positions_is_another() -> None:
    def flat(m: Model, x: Tensor) -> Tensor:
        out: Tensor = x + m.mlps[0].down(F.gelu(m.mlps[0].up(x).reshape(-1, INTERMEDIATE))).view(x.shape)
        return out

    given = exported(Model(flat, Mlp()))
    assert "it reads (2, 5, 10) and writes (10, 10)" in refused(given, planned(given))


READ_ELSEWHERE: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "mlps.0.extra": lambda m, x: x + m.mlps[0].extra * m.mlps[0](x),
    "mlps.0.up.weight": lambda m, x: x + m.mlps[0](x) + m.mlps[0].up.weight.abs().sum(),
    "mlps.0.down.bias": lambda m, x: x * m.mlps[0].down.bias + m.mlps[0](x) + x,
}


@pytest.mark.parametrize("name", READ_ELSEWHERE)
def test_refused_where_something_else_reads_what_would_go(name: str) -> None:
    mlp = Mlp()
    mlp.extra = nn.Parameter(torch.ones(HIDDEN))
    given = exported(Model(READ_ELSEWHERE[name], mlp))
    assert f"which is no part of its FFN, reads {name}: hold that in another module" in refused(given, planned(given))
