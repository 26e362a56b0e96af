"""The applier for graphs: dense FFNs of an exported or traced graph become MoE layers, by the passes."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from moeify.config import MoEConfig
from moeify.conversion.layout import fill_layer, layer_tensors
from moeify.conversion.restructure import read
from moeify.errors import MoeifyError, RefusedError
from moeify.layers.build import layer_in
from moeify.passes.activation import bind
from moeify.passes.dataflow import op_name
from moeify.passes.ffn import Inspection
from moeify.passes.find_ffn import FindFFN
from moeify.passes.insert_losses import InsertLosses
from moeify.passes.insert_moe import InsertMoE
from moeify.plan import Plan
from moeify.planning.make_plan import make_plan
from moeify.tracing.graphs import inline_blocks
from moeify.tracing.trace import Inputs


def convert_graph(
    graph: torch.export.ExportedProgram | fx.GraphModule,
    config: MoEConfig,
    layers: str = "all",
    *,
    example_inputs: Inputs | None = None,
    return_losses: bool = False,
) -> fx.GraphModule:
    """Replace the dense FFNs of a graph by mixtures of experts.

    Every FFN that is found can be replaced here, also one that is written into its block or made of 1x1 convolutions.
    New parameters are named as the in-place conversion names them.

    Args:
        graph: What `torch.export.export`, `moeify.tracing.trace.trace` or `torch.fx.symbolic_trace` returned. It is not
            changed; parameters that stay are shared with it.
        config: Experts, top_k and the rest.
        layers: Which FFNs: "all", "every:2", "last:8", "0,3-7", or a regular expression on their paths.
        example_inputs: For a graph of `symbolic_trace`, which does not know shapes: inputs that it accepts.
        return_losses: The result returns a pair, what the graph returned and the losses ().

    Returns:
        A GraphModule that trains, exports and compiles. Its layers are `SparseMoE` modules, which `train()` and
        `eval()` reach; the rest stays in the mode that it was traced in. `Lower` writes the layers out.

    Raises:
        RefusedError: no FFN was found.
        ConfigError: the selection matches nothing.
        MoeifyError: a graph of `symbolic_trace` came without inputs.
    """
    dense = _aten(graph, example_inputs)
    graph_module = _copy(dense)
    inspection = FindFFN()(graph_module)
    _refuse_blocks(dense, inspection)
    plan = make_plan(graph_module, graph_module, inspection, config, layers, in_place=False)
    converted = _insert(graph_module, dense, plan, inspection)
    for site in plan.sites:
        fill_layer(converted.get_submodule(site.path), layer_tensors(site, config), partial(read, dense))
    if config.attach_losses or not return_losses:
        return converted
    return InsertLosses()(converted).graph_module


def _insert(graph_module: fx.GraphModule, dense: fx.GraphModule, plan: Plan, inspection: Inspection) -> fx.GraphModule:
    regions = {ffn.projected: bind(ffn.region, partial(read, dense)) for ffn in inspection.ffns}
    paths = {site.down.parameter: site.path for site in plan.sites}
    layers = {
        site.down.parameter: layer_in(dense, site, plan.config, regions[site.parameters]).train(graph_module.training)
        for site in plan.sites
    }
    return InsertMoE(layers, paths)(graph_module).graph_module


def _aten(graph: torch.export.ExportedProgram | fx.GraphModule, example_inputs: Inputs | None) -> fx.GraphModule:
    """Return an ATen graph that shares the parameters; it may be the given one."""
    if isinstance(graph, torch.export.ExportedProgram):
        return graph.module(check_guards=False)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    if any("val" in node.meta for node in calls):
        return graph
    if example_inputs is None:
        raise MoeifyError("a graph of symbolic_trace knows no shapes: pass example_inputs")
    inputs: Any = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, dict) else (tuple(inputs), {})
    return torch.export.export(graph, args, kwargs, strict=False).module(check_guards=False)


def _refuse_blocks(graph_module: fx.GraphModule, inspection: Inspection) -> None:
    """Refuse FFNs in what torch.export sets apart, `with torch.no_grad()` and `with autocast`: passes do not go in."""
    inlined = inline_blocks(_copy(graph_module))
    seen = {ffn.down.weight for ffn in inspection.ffns}
    hidden = [ffn for ffn in FindFFN()(inlined).ffns if ffn.down.weight not in seen]
    if hidden:
        more = f" and {len(hidden) - 1} more" if len(hidden) > 1 else ""
        raise RefusedError(
            f"{hidden[0].name}{more}: computed in a block `with torch.no_grad()` or `with autocast` (checkpoint's "
            "use_reentrant=True is one), which torch.export sets apart: export without it, or convert in place"
        )


def _copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a GraphModule with a graph of its own and the same parameters, in the mode that it was traced in."""
    graph = fx.Graph()
    returned = graph.graph_copy(graph_module.graph, {})
    graph.output(returned)
    graph.set_codegen(graph_module.graph._codegen)
    fresh = fx.GraphModule(graph_module, graph)
    fresh.meta = dict(graph_module.meta)
    for path, module in graph_module.named_modules():
        with suppress(AttributeError):  # the copy has what the graph reads
            fresh.get_submodule(path)._non_persistent_buffers_set |= module._non_persistent_buffers_set
    return fresh.train(any(node.args[2] for node in graph.nodes if op_name(node) == "dropout"))
