"""What is computed between the projections of an FFN, as a graph of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import fx, nn

from moeify.passes.matching.cut import Cut
from moeify.passes.matching.dataflow import shape, size
from moeify.passes.matching.operators import Trait, has


def capture(
    graph_module: fx.GraphModule,
    inputs: Sequence[fx.Node],
    output: fx.Node,
    axis: int = -1,
    cuts: Sequence[Cut] = (),
) -> fx.GraphModule:
    """Copy the computation from `inputs` to `output` into a graph of its own, with the features in the last dimension.

    The copy takes activations of any leading shape. It leaves out reshapes that keep the features, and dropout (the
    layer has its own). Parameters that the computation reads come along as `get_attr` nodes.

    Args:
        graph_module: The traced model.
        inputs: The results of the projections that read the FFN's input.
        output: What the down projection reads.
        axis: Where the features lie in the traced model.
        cuts: What reshapes and selections take apart; the copy slices.
    """
    graph, slices = fx.Graph(), {cut.nodes[0]: cut for cut in cuts}
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(f"z{index}") for index, node in enumerate(inputs)}

    def copied(node: fx.Node) -> fx.Node:
        if node in copies:
            return copies[node]
        if cut := slices.get(node):
            arguments = (copied(cut.source), -1, cut.start, cut.stop, cut.step)
            new = graph.call_function(torch.ops.aten.slice.Tensor, arguments)
        elif has(node, Trait.RESHAPE | Trait.NEUTRAL) and size(node, axis) == size(node.all_input_nodes[0], axis):
            new = copied(node.all_input_nodes[0])
        elif (number := _written_number(graph_module, node)) is not None:
            new = graph.call_function(torch.ops.aten.scalar_tensor.default, (number.item(),), {"dtype": number.dtype})
        else:
            new = graph.node_copy(node, copied)
            _put_features_last(node, new, axis)
        return copies.setdefault(node, new)

    graph.output(copied(output))
    graph.lint()
    return fx.GraphModule(graph_module, graph, class_name="Activation")


def _written_number(graph_module: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    """Return a number that the code writes down as a tensor: it belongs into the graph, and not into a state dict."""
    if node.op != "get_attr" or not _is_constant(str(node.target)):
        return None
    value: torch.Tensor = attrgetter(str(node.target))(graph_module)
    return None if value.dim() or value.is_meta else value


def _is_constant(name: str) -> bool:
    """Whether torch.export or fx named what the code wrote as a tensor."""
    return name.rsplit(".", 1)[-1].startswith(("lifted_tensor", "_tensor_constant"))


def _put_features_last(original: fx.Node, copied: fx.Node, axis: int) -> None:
    """Make `dim` arguments that name the features negative: the copy is called on activations of other ranks."""
    if not isinstance(original.target, torch._ops.OpOverload) or not original.all_input_nodes:
        return
    features = {axis, len(shape(original.all_input_nodes[0])) + axis}
    for position, spec in enumerate(original.target._schema.arguments[: len(copied.args)]):
        value = copied.args[position]
        if spec.name != "dim":
            continue
        if isinstance(value, int):
            copied.update_arg(position, -1 if value in features else value)
        elif isinstance(value, list | tuple):
            copied.update_arg(position, [-1 if d in features else d for d in value])


def region_parameters(region: fx.GraphModule) -> list[str]:
    """Return the names of the parameters and buffers that a region reads; constants of the code are none."""
    names = dict.fromkeys(str(node.target) for node in region.graph.find_nodes(op="get_attr"))
    return [name for name in names if not _is_constant(name)]


def bind(region: fx.GraphModule, read: Callable[[str], torch.Tensor]) -> fx.GraphModule:
    """Return a copy of a region that has parameters and buffers of its own, with the values that `read` gives.

    They are called by their own last names (see `short_names`), wherever the model held them.
    """
    held: dict[str, object] = {}
    names = short_names(region_parameters(region))
    graph = copy.deepcopy(region.graph)
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = attrgetter(name)(region)
        if name in names:
            own = read(name).detach().clone()
            value = nn.Parameter(own, value.requires_grad) if isinstance(value, nn.Parameter) else own
            node.target = names[name]
        held[str(node.target)] = value
    return fx.GraphModule(held, graph, class_name="Activation")


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Shorten parameter names to their last parts, as many as it takes to tell them apart.

    `["layers.0.act.alpha", "layers.0.act.beta"]` become `alpha` and `beta`.
    """
    deepest = max((name.count(".") for name in names), default=0) + 1
    for parts in range(1, deepest + 1):
        short = ["_".join(name.split(".")[-parts:]) for name in names]
        if len(set(short)) == len(names):
            return dict(zip(names, short, strict=True))
    return {name: name.replace(".", "_") for name in names}
