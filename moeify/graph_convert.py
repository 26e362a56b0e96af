"""The graph applier: dense FFNs of an exported or traced graph become sparse layers, by the passes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from moeify.config import MoEConfig
from moeify.errors import MoeifyError, RefusedError
from moeify.layers import MoELayer
from moeify.layers.build import start_layer
from moeify.passes.base import copy_graph
from moeify.passes.ffn import FFN
from moeify.passes.matching.operators import op_name
from moeify.passes.pipeline import conversion
from moeify.plan import Site
from moeify.planning.make import Survey, make_plan, survey
from moeify.planning.weights import dense_ffn
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
    """Replace the dense FFNs of a graph by sparse mixtures of experts.

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
    source = _fresh(graph, example_inputs)
    found = survey(source)
    _refuse_blocks(source, found)
    plan = make_plan(source, found, config, layers, in_place=False)
    converted = conversion(plan, return_losses=return_losses)(source).graph_module
    ffns = {ffn.down.weight: ffn for ffn in found.inspection.ffns}
    for site in plan.sites:
        layer = converted.get_submodule(site.path)
        assert isinstance(layer, MoELayer)
        start_layer(layer, site, dense_ffn(site, partial(_dense, source, ffns[site.down.parameter], site)))
    return converted


def _fresh(graph: torch.export.ExportedProgram | fx.GraphModule, example_inputs: Inputs | None) -> fx.GraphModule:
    """Return an ATen graph of our own that shares the parameters."""
    if isinstance(graph, torch.export.ExportedProgram):
        return _copy(graph.module(check_guards=False))
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    if any("val" in node.meta for node in calls):
        return _copy(graph)
    if example_inputs is None:
        raise MoeifyError("a graph of symbolic_trace knows no shapes: pass example_inputs")
    inputs: Any = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, dict) else (tuple(inputs), {})
    return _copy(torch.export.export(graph, args, kwargs, strict=False).module(check_guards=False))


def _refuse_blocks(graph_module: fx.GraphModule, found: Survey) -> None:
    """Refuse FFNs in what torch.export sets apart, `with torch.no_grad()` and `with autocast`: passes do not go in."""
    if not any(op_name(node).startswith("wrap_with_") for node in graph_module.graph.nodes):
        return
    inlined = inline_blocks(copy_graph(graph_module))
    seen = {ffn.down.weight for ffn in found.inspection.ffns}
    hidden = [ffn for ffn in survey(inlined).inspection.ffns if ffn.down.weight not in seen]
    if hidden:
        more = f" and {len(hidden) - 1} more" if len(hidden) > 1 else ""
        raise RefusedError(
            f"{hidden[0].name}{more}: computed in a block `with torch.no_grad()` or `with autocast` (checkpoint's "
            "use_reentrant=True is one), which torch.export sets apart: export without it, or convert in place"
        )


def _copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a GraphModule with a graph of its own and the same parameters, in the mode that it was traced in."""
    fresh = copy_graph(graph_module)
    return fresh.train(any(node.args[2] for node in fresh.graph.nodes if op_name(node) == "dropout"))


def _dense(graph_module: fx.GraphModule, ffn: FFN, site: Site, name: str) -> Tensor:
    """Return a dense parameter; weights as the site says that they are stored."""
    value: Tensor = graph_module.get_parameter(name)
    stored = {p.weight: p for p in (*ffn.ups, ffn.down)}
    if name not in stored:
        return value
    value = value.flatten(1)  # a 1x1 convolution's weight has dimensions of size 1
    return value.t() if stored[name].transposed != site.transposed else value
