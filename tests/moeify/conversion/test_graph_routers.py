"""Every router in a graph: the same as in place, padding and token ids included, and written out as operators."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify.config import MoEConfig
from moeify.conversion.graph import convert_graph
from moeify.conversion.layout import fill_layer, layer_tensors
from moeify.conversion.restructure import read, restructure
from moeify.errors import RefusedError
from moeify.passes.find_ffn import find_ffns_in
from moeify.passes.lower import Lower
from moeify.passes.token_inputs import token_arguments
from moeify.planning.make_plan import make_plan
from tests.moeify import tiny

HIDDEN, VOCABULARY = 12, 17
ROUTERS = {
    "capacity": MoEConfig(4, 2, capacity_factor=1.25, z_loss=0.1),
    "sequence": MoEConfig(4, 2, balance_level="sequence"),
    "switch": MoEConfig.switch(4),
    "gshard": MoEConfig.gshard(4),
    "noisy_topk": MoEConfig.noisy_topk(4, 2),
    "sigmoid": MoEConfig.deepseek_v3(4, 2, router={"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.0}),
    "expert_choice": MoEConfig.expert_choice(4),
    "sinkhorn": MoEConfig(4, 2, router="sinkhorn"),
    "hash": MoEConfig(4, 1, router=moeify.routers.Hash(vocab_size=VOCABULARY)),
    "soft": MoEConfig(4, 1, router=moeify.routers.Soft(slots=2)),
}


class Tagger(nn.Module):
    """One FFN between an embedding and a head; padding is left to whoever calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, 5)
        self.ffn = nn.Sequential(nn.Linear(HIDDEN, 29), nn.GELU(), nn.Linear(29, HIDDEN))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids) * attention_mask[..., None]
        out: Tensor = self.head(x + self.ffn(x))
        return out


IDS = (torch.arange(21) * 5 % VOCABULARY).view(3, 7)
MASK = torch.ones(3, 7, dtype=torch.int64)
MASK[1, 5:], MASK[2, :2] = 0, 0
GIVEN = {"input_ids": IDS, "attention_mask": MASK}


def seeded(run: nn.Module) -> Any:
    torch.manual_seed(0)
    return run.train()(**GIVEN)


def in_place(program: torch.export.ExportedProgram, config: MoEConfig) -> nn.Module:
    """What `moeify.convert` does, with the trace that is there already."""
    model = Tagger()
    model.load_state_dict(program.state_dict)
    dense, graph_module = copy.deepcopy(model), program.module(check_guards=False)
    plan = make_plan(model, graph_module, find_ffns_in(graph_module), config)
    restructure(model, plan, {})
    for site in plan.sites:
        fill_layer(model.get_submodule(site.path), layer_tensors(site, config), partial(read, dense))
    return model


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    length = torch.export.Dim.DYNAMIC
    free = {"input_ids": {1: length}, "attention_mask": {1: length}}
    return torch.export.export(Tagger(), (), GIVEN, dynamic_shapes=free)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_graph_is_the_module_and_so_is_what_it_is_lowered_to(
    name: str, program: torch.export.ExportedProgram
) -> None:
    module = in_place(program, ROUTERS[name])
    graph = convert_graph(program, ROUTERS[name], return_losses=True)
    expected = seeded(module)
    out, loss = seeded(graph)
    assert torch.equal(out, expected)
    if name != "soft":  # which has no losses
        torch.testing.assert_close(loss, moeify.aux_loss(module))

    lowered = Lower()(graph).graph_module
    assert not lowered.graph.find_nodes(op="call_module")
    lowered_out, lowered_loss = seeded(lowered)
    torch.testing.assert_close(lowered_out, out)
    torch.testing.assert_close(lowered_loss, loss)
    other = {key: value[:, :4] for key, value in GIVEN.items()}
    assert lowered(**other)[0].shape == (3, 4, 5)


def test_the_mask_of_another_call_is_taken(program: torch.export.ExportedProgram) -> None:
    graph = convert_graph(program, ROUTERS["capacity"], return_losses=True).train()
    _, padded = graph(**GIVEN)
    _, whole = graph(input_ids=IDS, attention_mask=torch.ones_like(MASK))
    assert not torch.equal(padded, whole)


def test_gradients_are_those_of_the_module(program: torch.export.ExportedProgram) -> None:
    module = in_place(program, ROUTERS["capacity"])
    graph = convert_graph(program, ROUTERS["capacity"])
    for run in (graph, module):
        seeded(run).square().mean().backward()
    theirs = dict(module.named_parameters())
    assert all(p.grad is not None and torch.equal(p.grad, theirs[n].grad) for n, p in graph.named_parameters())  # type: ignore[arg-type]


class Bare(Tagger):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = x + self.ffn(x)
        return out


def test_hash_routing_is_refused_where_no_input_holds_token_ids() -> None:
    exported = torch.export.export(Bare(), (torch.zeros(2, 5, HIDDEN),))
    before = copy.deepcopy(exported.state_dict)
    with pytest.raises(RefusedError, match="hash routing needs the token ids"):
        convert_graph(exported, ROUTERS["hash"])
    assert all(torch.equal(value, exported.state_dict[name]) for name, value in before.items())


def test_decoders_are_handed_their_own_mask() -> None:
    given: dict[str, Any] = {**tiny.inputs("t5"), "use_cache": False}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    graph = convert_graph(torch.export.export(tiny.build("t5"), (), given, strict=False), MoEConfig(4, 2))
    calls = {str(node.target): node for node in graph.graph.find_nodes(op="call_module")}
    for path, node in calls.items():
        names = {key: str(value.target) for key, value in node.kwargs.items() if isinstance(value, torch.fx.Node)}
        decoder = {"token_ids": "decoder_input_ids"}
        encoder = {"token_ids": "input_ids", "mask": "attention_mask"}
        assert names == (decoder if path.startswith("decoder") else encoder)
        assert token_arguments(graph.graph, node.args[0]) == node.kwargs
