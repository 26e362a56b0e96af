"""The applier for graphs: dense FFNs of an exported or traced graph become MoE layers, by the passes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from moeify.arguments import check_config
from moeify.config import MoEConfig
from moeify.conversion.layout import fill_layer, layer_tensors
from moeify.conversion.restructure import read
from moeify.errors import ConfigError, MoeifyError, RefusedError
from moeify.passes.base import copy_graph
from moeify.passes.ffn import Inspection
from moeify.passes.find_ffn import find_ffns_in
from moeify.passes.matching.operators import op_name
from moeify.passes.pipeline import conversion
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

    Every FFN that is found can be replaced here, also one whose weights are its block's own parameters.
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
        RefusedError: No FFN was found.
        ConfigError: The selection matches nothing, or an argument is of another kind.
        MoeifyError: A graph of `symbolic_trace` came without inputs.
    """
    check_config(config)
    dense = _aten(graph, example_inputs)
    found = find_ffns_in(dense)
    _refuse_blocks(dense, found)
    plan = make_plan(dense, dense, found, config, layers, in_place=False)
    converted = conversion(plan, return_losses=return_losses)(dense).graph_module
    for site in plan.sites:
        fill_layer(converted.get_submodule(site.path), layer_tensors(site, config), partial(read, dense))
    return converted


def _aten(graph: torch.export.ExportedProgram | fx.GraphModule, example_inputs: Inputs | None) -> fx.GraphModule:
    """Return an ATen graph of our own that shares the parameters, in the mode that it was traced in."""
    if not isinstance(graph, torch.export.ExportedProgram | fx.GraphModule):
        raise ConfigError(
            f"graph is a {type(graph).__name__}: expected an exported program: pass torch.export.export(model, args), "
            "or convert the model in place by moeify.convert"
        )
    if isinstance(graph, torch.export.ExportedProgram):
        found = graph.module(check_guards=False)
    elif any("val" in node.meta for node in graph.graph.nodes if node.op == "call_function"):
        found = graph
    elif example_inputs is None:
        raise MoeifyError("a graph of symbolic_trace knows no shapes: pass example_inputs")
    else:
        inputs: Any = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, dict) else (tuple(inputs), {})
        found = torch.export.export(graph, args, kwargs, strict=False).module(check_guards=False)
    own = copy_graph(found)
    return own.train(any(node.args[2] for node in own.graph.nodes if op_name(node) == "dropout"))


def _refuse_blocks(graph_module: fx.GraphModule, found: Inspection) -> None:
    """Refuse FFNs in what torch.export sets apart, `with torch.no_grad()` and `with autocast`: passes do not go in."""
    if not any(op_name(node).startswith("wrap_with_") for node in graph_module.graph.nodes):
        return
    seen = {ffn.down.weight: len(ffn.calls) for ffn in found.ffns}
    inlined = find_ffns_in(inline_blocks(copy_graph(graph_module)))
    hidden = [ffn for ffn in inlined.ffns if len(ffn.calls) > seen.get(ffn.down.weight, 0)]
    if hidden:
        more = f" and {len(hidden) - 1} more" if len(hidden) > 1 else ""
        raise RefusedError(
            f"{hidden[0].name}{more}: computed in a block `with torch.no_grad()` or `with autocast` (checkpoint's "
            "use_reentrant=True is one), which torch.export sets apart: export without it (all under "
            "torch.no_grad(), say), or convert in place"
        )
