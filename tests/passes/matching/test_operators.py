from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from moeify.passes.matching import operators
from moeify.passes.matching.operators import Trait, has, op_name

aten = torch.ops.aten


def call(target: object) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(target, (graph.placeholder("x"),))  # type: ignore[arg-type]


def test_the_table_names_operators_that_exist_and_each_once() -> None:
    names = [name for row in operators._TABLE for name in row.split()]
    assert len(names) == len(set(names))
    missing = {name for name in names if not hasattr(aten, name) and not hasattr(aten, f"{name}_")}
    assert missing == {"getitem", "stand_in"}  # Python's own, and `moeify::stand_in`


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (aten.mul.Tensor, "mul"),
        (aten.mul_.Scalar, "mul"),
        (aten._unsafe_view.default, "_unsafe_view"),
        (aten._index_put_impl_.default, "_index_put_impl"),
        (operator.getitem, "getitem"),
    ],
)
def test_an_operator_has_one_name_whatever_its_overload(target: object, name: str) -> None:
    assert op_name(call(target)) == name


def test_what_is_no_function_call_has_no_name_and_no_trait() -> None:
    graph = fx.Graph()
    for node in (graph.placeholder("mul"), graph.create_node("get_attr", "add"), graph.create_node("call_module", "t")):
        assert op_name(node) == ""
        assert not has(node, ~Trait.NONE)


TRAITS: dict[str, tuple[object, Trait]] = {
    "a split": (aten.chunk.default, Trait.VIEW | Trait.MOVE | Trait.LINEAR | Trait.ALONG),
    "a transposition": (aten.mT.default, Trait.TRANSPOSE | Trait.VIEW | Trait.MOVE | Trait.LINEAR),
    "a sum of two": (aten.add.Tensor, Trait.SUM | Trait.LINEAR | Trait.FORWARD | Trait.POINTWISE),
    "a product of two": (aten.mul.Tensor, Trait.SCALE | Trait.WEIGH | Trait.FORWARD | Trait.POINTWISE),
    "a matrix product": (aten.linear.default, Trait.PRODUCT | Trait.MIX),
    "a product of streams": (aten.matmul.default, Trait.PRODUCT),
    "stacked products": (aten.bmm.default, Trait.PRODUCT | Trait.STACKED),
    "a choice": (aten.topk.default, Trait.CHOICE | Trait.ROUTING | Trait.REDUCTION | Trait.ALONG),
    "tagged by torch alone": (aten.sin.default, Trait.POINTWISE),
    "named in the table alone": (aten.square.default, Trait.POINTWISE),
    "nobody knows": (aten.fft_fft.default, Trait.NONE),
    "no operator of torch": (operator.floordiv, Trait.NONE),
}


@pytest.mark.parametrize(("target", "expected"), TRAITS.values(), ids=TRAITS)
def test_exactly_these_traits(target: object, expected: Trait) -> None:
    node = call(target)
    assert {trait for trait in Trait if has(node, trait)} == {trait for trait in Trait if trait & expected}


def test_one_of_several_traits_is_enough() -> None:
    assert has(call(aten.relu.default), Trait.MIX | Trait.POINTWISE)
    assert not has(call(aten.relu.default), Trait.MIX | Trait.NORM)
