from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from torch import fx, nn

import moeify.passes
from moeify.errors import MoeifyError, RefusedError
from moeify.passes import base
from moeify.passes.base import Pass, PassError, PassResult, Rewrite, copy_graph
from moeify.passes.find_ffn import FindFFN, findings
from moeify.passes.insert_losses import InsertLosses
from moeify.passes.insert_moe import InsertMoE
from moeify.passes.lower import Lower
from moeify.passes.matching.match import Matcher
from moeify.passes.pipeline import Pipeline, conversion
from tests.passes.blocks import TOKENS, Mlp, Model, exported, planned, residual, snapshot


@dataclass(frozen=True)
class Rename(Rewrite):
    """Call an operator by another one."""

    old: str = "gelu"
    new: str = "relu"
    promise: bool = True

    def requires(self, graph_module: fx.GraphModule) -> None:
        if self.old == self.new:
            raise RefusedError("nothing to rename")

    def rewrite(self, draft: fx.GraphModule) -> bool:
        nodes = [node for node in draft.graph.nodes if self.old in str(node.target)]
        for node in nodes:
            node.target = getattr(torch.ops.aten, self.new).default
            node.kwargs = {}
        return bool(nodes)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        if not self.promise:
            raise PassError("not kept")


def targets(graph_module: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in graph_module.graph.nodes}


def test_a_rewrite_returns_another_graph_that_shares_the_parameters() -> None:
    given = exported(residual())
    before = snapshot(given)
    result = Rename()(given)
    assert result.modified and result.graph_module is not given
    assert "aten.relu.default" in targets(result.graph_module) and "aten.gelu.default" in targets(given)
    assert targets(given) - targets(result.graph_module) == {
        "aten.gelu.default",
        "other.weight",
        "other.bias",
    }  # unused
    assert snapshot(given) == before
    for name, parameter in result.graph_module.named_parameters():
        assert parameter is given.get_parameter(name)


def test_a_rewrite_that_changes_nothing_returns_the_graph_it_was_given() -> None:
    given = exported(residual())
    assert Rename("sigmoid")(given) == PassResult(given, modified=False)


def test_what_a_pass_requires_and_ensures_is_checked() -> None:
    given = exported(residual())
    with pytest.raises(RefusedError, match="nothing to rename"):
        Rename("gelu", "gelu")(given)
    with pytest.raises(PassError, match="not kept"):
        Rename(promise=False)(given)


def test_a_graph_that_is_not_well_formed_names_the_pass() -> None:
    @dataclass(frozen=True)
    class Break(Rewrite):
        def rewrite(self, draft: fx.GraphModule) -> bool:
            product = next(node for node in draft.graph.nodes if "linear" in node.name)
            with draft.graph.inserting_before(product):
                product.update_arg(1, draft.graph.create_node("get_attr", "nowhere.at.all"))
            return True

    with pytest.raises(PassError, match=r"^Break left a graph that is not well formed: .*nowhere"):
        Break()(exported(residual()))


# Every pass, with what its graph must be before it.
def dense() -> fx.GraphModule:
    return exported(residual(Mlp(), Mlp()))


def searched() -> fx.GraphModule:
    return FindFFN()(dense()).graph_module


def sparse() -> fx.GraphModule:
    given = dense()
    return InsertMoE(planned(given))(given).graph_module


def with_losses() -> fx.GraphModule:
    return InsertLosses()(sparse()).graph_module


PASSES: dict[str, tuple[Callable[[], fx.GraphModule], Callable[[fx.GraphModule], Pass]]] = {
    "FindFFN": (dense, lambda gm: FindFFN()),
    "InsertMoE": (searched, lambda gm: InsertMoE(planned(gm))),
    "InsertLosses": (sparse, lambda gm: InsertLosses()),
    "Lower": (with_losses, lambda gm: Lower()),
    "Pipeline": (searched, lambda gm: Pipeline((conversion(planned(gm), return_losses=True), Lower()))),
}


def stop_after(calls: int, function: Callable[..., object]) -> Callable[..., object]:
    """A function that works so many times and fails then."""
    left = iter(range(calls))

    def run(*args: object, **kwargs: object) -> object:
        if next(left, None) is None:
            raise RuntimeError("stopped half-way")
        return function(*args, **kwargs)

    return run


BREAKS: dict[str, tuple[type, str, int]] = {
    "half-way": (fx.Graph, "erase_node", 1),
    "by the lint": (fx.Graph, "lint", 0),
    "while the result is made": (fx.GraphModule, "recompile", 1),
}


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("name", PASSES)
def test_a_pass_that_is_stopped_leaves_the_graph_as_it_was(
    name: str, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, choose = PASSES[name]
    given = make()
    pass_, before = choose(given), snapshot(given)
    owner, attribute, calls = (Matcher, "match", 1) if name == "FindFFN" else BREAKS[broken]
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, stop_after(calls, getattr(owner, attribute)))
        with pytest.raises((RuntimeError, PassError), match="stopped half-way"):
            pass_(given)
    assert snapshot(given) == before
    assert pass_(given).graph_module is not None  # it still runs on that graph


REFUSALS: dict[str, tuple[Callable[[], fx.GraphModule], Callable[[fx.GraphModule], Pass]]] = {
    "InsertMoE": (dense, lambda gm: InsertMoE(planned(exported(residual())))),
    "Pipeline": (sparse, lambda gm: Pipeline((Lower("reference"), InsertMoE(planned(dense()))))),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_leaves_the_graph_as_it_was(name: str) -> None:
    make, choose = REFUSALS[name]
    given = make()
    before = snapshot(given)
    with pytest.raises(RefusedError):
        choose(given)(given)
    assert snapshot(given) == before


def all_passes() -> Iterator[type[Pass]]:
    for module in pkgutil.iter_modules(moeify.passes.__path__):
        if not module.ispkg:
            importlib.import_module(f"moeify.passes.{module.name}")
    for pass_ in {*Pass.__subclasses__(), *Rewrite.__subclasses__()} - {Rewrite}:
        if pass_.__module__.startswith("moeify."):
            yield pass_


def test_every_pass_is_a_file_of_its_name_whose_options_are_data() -> None:
    found = {pass_.__name__: pass_ for pass_ in all_passes()}
    assert set(found) == set(PASSES)
    for name, pass_ in found.items():
        word = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
        word = word.replace("f_f_n", "ffn").replace("mo_e", "moe")
        assert pass_.__module__ == f"moeify.passes.{word}"
        assert (Path(__file__).parent / f"test_{word}.py").exists()
        assert dataclasses.is_dataclass(pass_) and pass_.__dataclass_params__.frozen  # type: ignore[attr-defined]
        for option in get_type_hints(pass_).values():
            assert not (isinstance(option, type) and issubclass(option, nn.Module))
        if name != "Pipeline":  # it may show graphs to whoever wants to see them
            options = {field.name: None for field in dataclasses.fields(pass_) if field.default is dataclasses.MISSING}
            assert set(options) <= {"plan"}


def test_a_pass_prints_its_options_and_names_itself() -> None:
    assert repr(Lower("cpu")) == "Lower(implementation='cpu')"
    assert str(Lower("cpu")) == "Lower"
    assert Lower("cpu") == Lower("cpu") != Lower()


def test_findings_come_along_with_a_copy_and_are_about_its_nodes() -> None:
    given = searched()
    copied = copy_graph(given)
    ours, theirs = findings(copied), findings(given)
    assert ours != theirs and [ffn.name for ffn in ours.ffns] == [ffn.name for ffn in theirs.ffns]
    for mine, other in zip(ours.ffns, theirs.ffns, strict=True):
        assert [node.name for node in mine.calls[0].inside] == [node.name for node in other.calls[0].inside]
        assert all(node.graph is copied.graph for node in mine.calls[0].inside)
        assert mine.region is other.region


def test_findings_do_not_outlive_the_graph_they_are_about() -> None:
    result = Rename()(searched()).graph_module
    with pytest.raises(RefusedError, match="run FindFFN first"):
        findings(result)


def drop_unused(given: fx.GraphModule) -> set[str]:
    """Run what follows every rewriting; return the names of the nodes that it erased."""
    before = {node.name for node in given.graph.nodes}
    base._drop_unused(given.graph)
    return before - {node.name for node in given.graph.nodes}


def test_what_only_prepares_parameters_is_dropped_with_its_last_reader() -> None:
    given = exported(residual())
    drop_unused(given)
    (product,) = [node for node in given.graph.nodes if str(node.args[1:2]) == "(mlps_0_down_weight,)"]
    weight = product.args[1]
    with given.graph.inserting_before(product):
        turned = given.graph.call_function(torch.ops.aten.t.default, (weight,))
        given.graph.call_function(torch.ops.aten.t.default, (turned,))
    product.replace_all_uses_with(product.args[0])
    given.graph.erase_node(product)
    assert drop_unused(given) == {"mlps_0_down_weight", "mlps_0_down_bias", "t_default", "t_default_1"}


def test_what_depends_on_the_input_or_writes_stays() -> None:
    given = exported(Model(lambda m, x: x + m.other.weight.sum()))
    drop_unused(given)
    total = next(node for node in given.graph.nodes if "sum" in node.name)
    with given.graph.inserting_after(total):
        given.graph.call_function(torch.ops.aten.mul_.Tensor, (total, 2))  # nobody reads its result
        given.graph.call_function(torch.ops.aten.arange.default, (TOKENS,))  # reads nothing: it may have an effect
    (x,) = given.graph.find_nodes(op="placeholder")
    given.graph.call_function(torch.ops.aten.relu.default, (x,))
    assert drop_unused(given) == set()


def test_every_error_of_a_pass_is_a_refusal_or_a_bug() -> None:
    assert issubclass(RefusedError, MoeifyError) and not issubclass(PassError, MoeifyError)
