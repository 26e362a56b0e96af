"""The position-wise region between the projections of an FFN: captured as its own graph, then recognised by value.

A region is recognised by evaluating it on numbers and comparing with known functions, not by its operators: so a
hand-written x·sigmoid(1.702x), a fused gate+up projection in either order and a call to `F.silu` are all seen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import fx, nn

from moeify.passes.cut import Cut
from moeify.passes.dataflow import RESHAPES, op_name, shape, size

Unary = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Unary] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "mish": F.mish,
    "identity": lambda x: x,
}
CUSTOM = "custom"
_LEFT_OUT = RESHAPES | {"contiguous", "clone", "dropout"}


@dataclass(frozen=True)
class Halves:
    """Which rows of the projections make the gate and which the up half: (projection index, start, stop, step)."""

    gate: tuple[int, int, int, int] | None
    up: tuple[int, int, int, int]


@dataclass(frozen=True)
class Recognised:
    """A region's canonical name ("custom" when nobody has one) and the roles of its inputs (None when custom)."""

    activation: str
    halves: Halves | None


def capture(
    graph_module: fx.GraphModule,
    inputs: Iterable[fx.Node],
    output: fx.Node,
    axis: int = -1,
    cuts: Mapping[fx.Node, Cut] = MappingProxyType({}),
) -> fx.GraphModule:
    """Copy the computation from `inputs` to `output` into a graph of its own, for rows in the last dimension.

    The copy takes activations of any leading shape. Reshapes that keep rows whole are left out and dropout too (the
    layer has its own); parameters that the region reads come along as `get_attr` nodes.

    Args:
        graph_module: The traced model.
        inputs: The projections at the region's edge.
        output: What the projection back reads.
        axis: Where the rows lie in the traced model.
        cuts: Which nodes hold a slice of each row, made by reshapes and selections; the copy slices.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"z{index}")
    for node in _in_order(output, set(copies), cuts):
        if node in cuts:
            copies[node] = _sliced(graph, copies[cuts[node].source], cuts[node])
        elif op_name(node) in _LEFT_OUT and size(node, axis) == size(node.all_input_nodes[0], axis):
            copies[node] = copies[node.all_input_nodes[0]]
        else:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            _put_rows_last(node, copies[node], axis)
    graph.output(copies[output])
    graph.lint()
    return fx.GraphModule(graph_module, graph, class_name="Activation")


def _sliced(graph: fx.Graph, row: fx.Node, cut: Cut) -> fx.Node:
    return graph.call_function(torch.ops.aten.slice.Tensor, (row, -1, cut.start, cut.stop, cut.step))


def _in_order(output: fx.Node, stop: set[fx.Node], cuts: Mapping[fx.Node, Cut]) -> list[fx.Node]:
    """Return the ancestors of `output` down to `stop` (not included), each after its inputs."""
    order: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        if node in stop or node in order:
            return
        for argument in [cuts[node].source] if node in cuts else node.all_input_nodes:
            visit(argument)
        order[node] = None

    visit(output)
    return list(order)


def _put_rows_last(original: fx.Node, copied: fx.Node, axis: int) -> None:
    """Make `dim` arguments that name the row negative, because the region is called on activations of other ranks."""
    if not isinstance(original.target, torch._ops.OpOverload) or not original.all_input_nodes:
        return
    rank = len(shape(original.all_input_nodes[0]))
    rows = {axis, rank + axis}
    for position, spec in enumerate(original.target._schema.arguments[: len(copied.args)]):
        value = copied.args[position]
        if spec.name != "dim":
            continue
        if isinstance(value, int):
            copied.update_arg(position, -1 if value in rows else value)
        elif isinstance(value, list | tuple):
            copied.update_arg(position, [-1 if d in rows else d for d in value])


def recognise(region: fx.GraphModule, widths: list[int], intermediate: int) -> Recognised:
    """Name a region by evaluating it in float64 on values from -12 to 12.

    Args:
        region: What `capture` returned.
        widths: Width of each input (the projections' outputs).
        intermediate: Width of the region's output.
    """
    if learned(region):
        return Recognised(CUSTOM, None)  # its values are not known, so no name can be claimed
    inputs = [_probe(size, seed) for seed, size in enumerate(widths)]
    try:
        result = region(*inputs).double()
    except (RuntimeError, TypeError, ValueError):
        return Recognised(CUSTOM, None)
    for halves in _roles(widths, intermediate):
        gate = None if halves.gate is None else _take(inputs, halves.gate)
        up = _take(inputs, halves.up)
        for name, function in ACTIVATIONS.items():
            expected = function(up) if gate is None else function(gate) * up
            if (gate is not None or name != "identity") and _equal(result, expected):
                return Recognised(name, halves)
    return Recognised(CUSTOM, None)


def learned(region: fx.GraphModule) -> list[str]:
    """Return the names of the parameters and buffers that a region reads; constants of the code are none."""
    names = dict.fromkeys(str(node.target) for node in region.graph.nodes if node.op == "get_attr")
    return [name for name in names if not _is_constant(name)]


def bind(region: fx.GraphModule, read: Callable[[str], torch.Tensor]) -> fx.GraphModule:
    """Return a copy of a region that has parameters and buffers of its own, with the values that `read` gives.

    They are called by their own last names (see `own_names`), wherever the model held them.
    """
    held: dict[str, object] = {}
    names = own_names(learned(region))
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


def own_names(names: Sequence[str]) -> dict[str, str]:
    """Shorten parameter names to their last parts, as many as it takes to tell them apart.

    `["layers.0.act.alpha", "layers.0.act.beta"]` become `alpha` and `beta`.
    """
    deepest = max((name.count(".") for name in names), default=0) + 1
    for parts in range(1, deepest + 1):
        short = ["_".join(name.split(".")[-parts:]) for name in names]
        if len(set(short)) == len(names):
            return dict(zip(names, short, strict=True))
    return {name: name.replace(".", "_") for name in names}


def _is_constant(name: str) -> bool:
    # torch.export and fx name what the code wrote as a tensor by themselves.
    return name.rsplit(".", 1)[-1].startswith(("lifted_tensor", "_tensor_constant"))


def _roles(widths: list[int], intermediate: int) -> list[Halves]:
    """List the ways in which inputs of these widths can make one output of width `intermediate`."""
    size = intermediate
    match widths:
        case [single] if single == size:
            return [Halves(None, (0, 0, size, 1))]
        case [fused] if fused == 2 * size:
            first, second = (0, 0, size, 1), (0, size, 2 * size, 1)
            even, odd = (0, 0, 2 * size, 2), (0, 1, 2 * size, 2)
            return [Halves(first, second), Halves(second, first), Halves(even, odd), Halves(odd, even)]
        case [a, b] if a == b == size:
            first, second = (0, 0, size, 1), (1, 0, size, 1)
            return [Halves(first, second), Halves(second, first)]
    return []


def _take(inputs: list[torch.Tensor], rows: tuple[int, int, int, int]) -> torch.Tensor:
    index, start, stop, step = rows
    return inputs[index][..., start:stop:step]


def _probe(size: int, seed: int) -> torch.Tensor:
    """Return (2, size) values spread over [-12, 12], in another order for each seed."""
    steps = torch.arange(2 * size, dtype=torch.float64).reshape(2, size)
    golden = (math.sqrt(5) - 1) / 2
    return 24 * ((steps * golden + 0.37 * seed) % 1) - 12


def _equal(result: torch.Tensor, expected: torch.Tensor) -> bool:
    if result.shape != expected.shape:
        return False
    return bool(((result - expected).abs() <= 2e-6 * expected.abs().clamp(min=1)).all())
