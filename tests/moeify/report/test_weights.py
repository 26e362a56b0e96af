from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import moeify
from moeify.config import MoEConfig
from moeify.contract.found import find_layers
from moeify.conversion.dense import Dense
from moeify.methods import Drop
from moeify.planning.make_plan import make_plan
from moeify.report.weights import distances, weights_of
from tests.moeify import native, tiny


@pytest.mark.parametrize("name", ["mixtral", "dbrx", "jetmoe", "gpt_oss", "switch"])
def test_experts_are_told_apart_in_every_form(name: str) -> None:
    """Stacked, as rows of one matrix, and one module each: two that are made equal have the cosine 1."""
    model = native.build(name)
    layer = next(iter(find_layers(model).values()))
    with torch.no_grad():
        for part in layer.experts:
            for key, parameter in part.named_parameters():
                if key.startswith("expert_1."):
                    parameter.copy_(part.get_parameter(key.replace("1", "4", 1)))
                elif not key.startswith("expert_") and parameter.dim() > 1:
                    rows = parameter.view(layer.num_experts, -1)
                    rows[1] = rows[4]
    found = weights_of(layer)
    assert found and found.closest == (1, 4, 1.0) and found.farthest and found.farthest[2] < 0.5
    assert [row[number] for number, row in enumerate(found.cosine)] == [1.0] * layer.num_experts


def test_linears_are_those_of_the_stack() -> None:
    model: Any = moeify.convert(tiny.build("llama"), MoEConfig(4, 2, method=Drop(share=0.5)))
    path, layer = next(iter(find_layers(model).items()))
    stacked = weights_of(layer)
    flat = [torch.cat([p[number].detach().flatten() for p in layer.experts[0].parameters()]) for number in (0, 1)]
    assert stacked and weights_of(find_layers(moeify.linearize(model))[path]) == stacked
    assert stacked.cosine[0][1] == pytest.approx(float(F.cosine_similarity(flat[0], flat[1], dim=0)), rel=1e-3)


def test_many_experts_have_no_matrix() -> None:
    model = moeify.convert(tiny.build("llama"), MoEConfig(17, 2))
    found = weights_of(next(iter(find_layers(model).values())))
    assert found and found.cosine == () and found.mean == 1


@pytest.mark.parametrize(("granularity", "shared"), [(1, 0), (3, 1)])
def test_a_fresh_copy_has_no_distance_whatever_it_is_a_part_of(granularity: int, shared: int) -> None:
    config = MoEConfig(6, 3, granularity=granularity, shared_experts=shared)
    dense = tiny.build("gpt2" if granularity == 1 else "llama")
    described = Dense(dense)
    plan = make_plan(dense, described.graph_module, described.inspection, config)
    values = {name: value.clone() for name, value in dense.state_dict().items()}
    model = moeify.convert(dense, config)
    for layer in find_layers(model).values():
        apart = distances(layer, plan, values.__getitem__)
        assert apart is not None and apart.tolist() == [0.0] * 6
    layer = next(iter(find_layers(model).values()))
    with torch.no_grad():
        for parameter in layer.experts[0].parameters():
            parameter[5] *= 1.25
    apart = distances(layer, plan, values.__getitem__)
    assert apart is not None and apart.tolist() == pytest.approx([0, 0, 0, 0, 0, 0.25])
    other = next(iter(find_layers(native.build("mixtral")).values()))
    assert distances(other, plan, values.__getitem__) is None
