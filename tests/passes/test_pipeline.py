from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import fx

from moeify.errors import RefusedError
from moeify.passes.base import Pass, PassError, PassResult, Rewrite
from moeify.passes.find_ffn import FindFFN, findings
from moeify.passes.insert_losses import InsertLosses
from moeify.passes.insert_moe import InsertMoE
from moeify.passes.lower import Lower
from moeify.passes.pipeline import Pipeline, conversion
from tests.passes.blocks import CONFIG, exported, planned, residual


@dataclass(frozen=True)
class Double(Rewrite):
    """Double what the graph returns."""

    def rewrite(self, draft: fx.GraphModule) -> bool:
        output = draft.graph.output_node()
        (result,) = output.all_input_nodes
        with draft.graph.inserting_before(output):
            output.replace_input_with(result, draft.graph.call_function(torch.ops.aten.mul.Tensor, (result, 2)))
        return True


@dataclass(frozen=True)
class Crash(Pass):
    def run(self, graph_module: fx.GraphModule) -> PassResult:
        raise KeyError("gone")


@dataclass(frozen=True)
class Refuse(Pass):
    def requires(self, graph_module: fx.GraphModule) -> None:
        raise RefusedError("not this one")

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        raise AssertionError("it was refused")


def test_each_pass_gets_the_result_of_the_one_before() -> None:
    given = exported(residual())
    result = Pipeline((Double(), FindFFN(), Double()))(given)
    x = torch.randn(2, 5, 10)
    assert result.modified
    torch.testing.assert_close(result.graph_module(x), 4 * given(x))


def test_a_pipeline_of_analyses_modifies_nothing() -> None:
    given = exported(residual())
    assert Pipeline((FindFFN(),))(given) == PassResult(given, modified=False)
    assert len(findings(given).ffns) == 1


def test_a_pipeline_is_a_pass() -> None:
    given, x = exported(residual()), torch.randn(2, 5, 10)
    result = Pipeline((Pipeline((Double(), Double())), Double()))(given).graph_module
    torch.testing.assert_close(result(x), 8 * given(x))


def test_the_callback_sees_every_pass_and_its_result() -> None:
    seen: list[tuple[str, bool]] = []
    pipeline = Pipeline((FindFFN(), Double()), lambda each, result: seen.append((str(each), result.modified)))
    pipeline(exported(residual()))
    assert seen == [("FindFFN", False), ("Double", True)]
    assert pipeline == Pipeline((FindFFN(), Double()))
    assert repr(pipeline) == "Pipeline(passes=(FindFFN(), Double()))"


def test_a_pass_that_fails_is_named_with_the_passes_before_it() -> None:
    with pytest.raises(PassError, match=r"^Crash failed: 'gone'; passes before it: FindFFN, Double$"):
        Pipeline((FindFFN(), Double(), Crash()))(exported(residual()))
    with pytest.raises(PassError, match=r"passes before it: none$"):
        Pipeline((Crash(),))(exported(residual()))


def test_a_refusal_keeps_its_kind_and_its_words() -> None:
    with pytest.raises(RefusedError, match=r"^not this one$"):
        Pipeline((Double(), Refuse()))(exported(residual()))


def test_a_conversion_is_one_tuple() -> None:
    plan = planned(exported(residual()))
    assert conversion(plan).passes == (InsertMoE(plan),)
    assert plan.config.attach_losses  # and losses that are returned are not attached as well
    given = replace(plan, config=replace(CONFIG, attach_losses=False))
    assert conversion(plan, return_losses=True).passes == (InsertMoE(given), InsertLosses())


def test_from_a_dense_graph_to_operators() -> None:
    given = exported(residual())
    plan = planned(given)
    result = Pipeline((FindFFN(), conversion(plan, return_losses=True), Lower("reference")))(given).graph_module
    assert not result.graph.find_nodes(op="call_module")
    out, loss = result(x := torch.randn(2, 5, 10))
    assert torch.equal(out, x) and loss.shape == ()  # experts of zeros
