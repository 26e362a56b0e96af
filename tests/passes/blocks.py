"""Small models, and what the tests of the passes ask of graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from moeify.config import MoEConfig
from moeify.passes.ffn import Inspection
from moeify.passes.find_ffn import find_ffns_in
from moeify.plan import Plan
from moeify.planning.make_plan import make_plan
from moeify.tracing.trace import trace

HIDDEN, INTERMEDIATE, TOKENS = 10, 23, 5
CONFIG = MoEConfig(experts=4, top_k=2)
Function = Callable[["Model", Tensor], Tensor]


class Mlp(nn.Module):
    def __init__(self, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, intermediate), nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Model(nn.Module):
    """Any function of x and one or more MLPs."""

    mlps: Any

    def __init__(self, function: Function, *mlps: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.mlps = nn.ModuleList(mlps)
        self.norm, self.other = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def residual(*mlps: nn.Module) -> Model:
    """MLPs one after the other, each with its residual connection."""

    def run(model: Model, x: Tensor) -> Tensor:
        for mlp in model.mlps:
            x = x + mlp(model.norm(x))
        return x

    return Model(run, *(mlps or (Mlp(),)))


def twice(m: Model, x: Tensor) -> Tensor:
    """One MLP that is called twice."""
    x = x + m.mlps[0](x)
    out: Tensor = x + m.mlps[0](m.other(x) + x)
    return out


def find(model: nn.Module, *shape: int) -> Inspection:
    return find_ffns_in(trace(model, torch.zeros(shape or (2, TOKENS, HIDDEN))))


def only_reason(found: Inspection, name: str) -> str:
    (reason,) = {refusal.reason for refusal in found.refused if refusal.name == name}
    return reason


def exported(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """A graph that holds the model's own parameters."""
    given = inputs or (torch.randn(2, TOKENS, HIDDEN),)
    return torch.export.export(model.eval(), given).module(check_guards=False)


def planned(graph_module: fx.GraphModule, config: MoEConfig = CONFIG, layers: str = "all") -> Plan:
    """A plan for a graph; the graph is searched by that."""
    return make_plan(graph_module, graph_module, find_ffns_in(graph_module), config, layers, in_place=False)


def snapshot(graph_module: fx.GraphModule) -> dict[str, object]:
    """All that may not change: the printed graph, the values, the modules, their modes, what is trained."""
    state = graph_module.state_dict()
    return {
        "graph": str(graph_module.graph),
        "code": graph_module.code,
        "values": {name: None if value.is_meta else value.tolist() for name, value in state.items()},
        "places": {name: value.data_ptr() for name, value in state.items()},
        "trained": {name: each.requires_grad for name, each in graph_module.named_parameters()},
        "modules": {name: (id(each), each.training) for name, each in graph_module.named_modules()},
        "meta": list(graph_module.meta),
    }
