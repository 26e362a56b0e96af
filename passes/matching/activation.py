"""The computation between the projections of an FFN: captured as a graph of its own, then recognized by its values.

Its values are compared with known functions, not its operators: so a hand-written x·sigmoid(1.702x), a fused gate and
up projection in either order and a call to `F.silu` are all seen.
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

from moeify.passes.matching.cut import Cut
from moeify.passes.matching.dataflow import shape, size
from moeify.passes.matching.operators import Trait, has

Unary = Callable[[torch.Tensor], torch.Tensor]
Rows = tuple[int, int, int, int]
"""Output rows of a projection: its index among the projections, then start, stop and step."""

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


@dataclass(frozen=True)
class GateUpRows:
    """Which output rows of the projections are the gate (None without one) and which are the up projection."""

    gate: Rows | None
    up: Rows


def capture(
    graph_module: fx.GraphModule,
    inputs: Iterable[fx.Node],
    output: fx.Node,
    axis: int = -1,
    cuts: Mapping[fx.Node, Cut] = MappingProxyType({}),
) -> fx.GraphModule:
    """Copy the computation from `inputs` to `output` into a graph of its own, with the features in the last dimension.

    The copy takes activations of any leading shape. It leaves out reshapes that keep the features, and dropout (the
    layer has its own). Parameters that the computation reads come along as `get_attr` nodes.

    Args:
        graph_module: The traced model.
        inputs: The results of the projections that read the FFN's input.
        output: What the down projection reads.
        axis: Where the features lie in the traced model.
        cuts: Which nodes hold a slice of the features, made by reshapes and selections; the copy slices.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(f"z{index}") for index, node in enumerate(inputs)}

    def copied(node: fx.Node) -> fx.Node:
        if node in copies:
            return copies[node]
        if node in cuts:
            cut = cuts[node]
            arguments = (copied(cut.source), -1, cut.start, cut.stop, cut.step)
            copy_ = graph.call_function(torch.ops.aten.slice.Tensor, arguments)
        elif has(node, Trait.RESHAPE | Trait.NEUTRAL) and size(node, axis) == size(node.all_input_nodes[0], axis):
            copy_ = copied(node.all_input_nodes[0])
        else:
            copy_ = graph.node_copy(node, copied)
            _put_features_last(node, copy_, axis)
        return copies.setdefault(node, copy_)

    graph.output(copied(output))
    graph.lint()
    return fx.GraphModule(graph_module, graph, class_name="Activation")


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


def recognize(region: fx.GraphModule, widths: Sequence[int], intermediate: int) -> tuple[str, GateUpRows | None]:
    """Name a region by its values in float64 from -12 to 12.

    Args:
        region: What `capture` returned.
        widths: How many features each input has (the projections' outputs).
        intermediate: How many features the output has.

    Returns:
        Its canonical name and which rows are gate and up; ("custom", None) when nobody has a name for it.
    """
    if region_parameters(region):
        return CUSTOM, None  # its values are not known, so no name can be claimed
    inputs = [_probe(width, seed) for seed, width in enumerate(widths)]
    try:
        result = region(*inputs).double()
    except (RuntimeError, TypeError, ValueError):
        return CUSTOM, None
    for rows in _possible_rows(list(widths), intermediate):
        up = _take(inputs, rows.up)
        gate = None if rows.gate is None else _take(inputs, rows.gate)
        for name, function in ACTIVATIONS.items():
            expected = function(up) if gate is None else function(gate) * up
            if (gate is not None or name != "identity") and _equal(result, expected):
                return name, rows
    return CUSTOM, None


def _possible_rows(widths: list[int], intermediate: int) -> list[GateUpRows]:
    """List the ways in which inputs with so many features can make one output with `intermediate`."""
    size = intermediate
    match widths:
        case [single] if single == size:
            return [GateUpRows(None, (0, 0, size, 1))]
        case [fused] if fused == 2 * size:
            first, second = (0, 0, size, 1), (0, size, 2 * size, 1)
            even, odd = (0, 0, 2 * size, 2), (0, 1, 2 * size, 2)
            pairs = [(first, second), (second, first), (even, odd), (odd, even)]
        case [a, b] if a == b == size:
            first, second = (0, 0, size, 1), (1, 0, size, 1)
            pairs = [(first, second), (second, first)]
        case _:
            return []
    return [GateUpRows(gate, up) for gate, up in pairs]


def _take(inputs: list[torch.Tensor], rows: Rows) -> torch.Tensor:
    index, start, stop, step = rows
    return inputs[index][..., start:stop:step]


def _probe(width: int, seed: int) -> torch.Tensor:
    """Return (2, width) values spread over [-12, 12], in another order for each seed."""
    steps = torch.arange(2 * width, dtype=torch.float64).reshape(2, width)
    golden = (math.sqrt(5) - 1) / 2
    return 24 * ((steps * golden + 0.37 * seed) % 1) - 12


def _equal(result: torch.Tensor, expected: torch.Tensor) -> bool:
    if result.shape != expected.shape:
        return False
    return bool(((result - expected).abs() <= 2e-6 * expected.abs().clamp(min=1)).all())


def region_parameters(region: fx.GraphModule) -> list[str]:
    """Return the names of the parameters and buffers that a region reads; constants of the code are none."""
    names = dict.fromkeys(str(node.target) for node in region.graph.find_nodes(op="get_attr"))
    # torch.export and fx name what the code wrote as a tensor by themselves.
    constants = ("lifted_tensor", "_tensor_constant")
    return [name for name in names if not name.rsplit(".", 1)[-1].startswith(constants)]


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
