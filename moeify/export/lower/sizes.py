"""Sizes that meet values on the device: a runtime keeps sizes on the CPU, and a copy of one forbids a CUDA graph.

`Range` reads its bounds on the CPU and writes on the device, so it is how a size gets there without a copy.

Before:  positions = Add(Range(0, length, 1), past)              (past = Squeeze(Shape(keys)))
After:   positions = Range(past, past + length, 1)

Before:  y = Mul(x, size)
After:   y = Mul(x, Squeeze(Range(size, size + 1, 1)))
"""

from __future__ import annotations

import onnx_ir as ir

from moeify.export.lower.tape import Tape

_SOURCES = {"Shape", "Size"}
# What a runtime computes on the CPU if all that goes in is sizes and constants. Operators that read sizes on the CPU
# and write on the device (Range, Expand, Slice at a size) are not among them.
_STAY = {
    "Abs", "Add", "Cast", "Ceil", "Concat", "Div", "Equal", "Floor", "Identity", "Max", "Min", "Mod", "Mul", "Neg",
    "Pow", "Reshape", "Sqrt", "Squeeze", "Sub", "Unsqueeze", "Where",
}  # fmt: skip
_PARTS = {"Gather", "Slice"}  # of sizes, at constant places
_TOGETHER = {
    "Add", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Pow",
    "Sub", "Where",
}  # fmt: skip
_RANGES = {ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE}


def settle_sizes(model: ir.Model) -> None:
    """Let no node of `model` compute with both sizes and values; in place."""
    sizes: set[ir.Value] = set()
    for node in list(model.graph):
        given = [value for value in node.inputs if value is not None and not _is_constant(value)]
        only_sizes = bool(given) and sizes.issuperset(given)
        stays = node.op_type in _STAY or (node.op_type in _PARTS and given == [node.inputs[0]])
        if node.op_type in _SOURCES or (only_sizes and stays):
            sizes.update(node.outputs)
        elif node.op_type in _TOGETHER and not only_sizes:
            for size in sizes.intersection(given):
                if size.dtype in _RANGES and size.shape is not None and not size.shape.dims:
                    _settle(model.graph, node, size)


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.is_initializer() if producer is None else producer.op_type == "Constant"


def _is_zero(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and not value.const_value.numpy().any()


def _settle(graph: ir.Graph, node: ir.Node, size: ir.Value) -> None:
    """Bring a scalar to the device, in the place of that one which a node reads."""
    tape = Tape()
    other = next((value for value in node.inputs if value is not None and value is not size), None)
    counted = other.producer() if other is not None and node.op_type == "Add" else None
    if counted is not None and counted.op_type == "Range":
        start, limit, step = counted.inputs
        begin = size if _is_zero(start) else tape("Add", start, size)
        old = node.outputs[0]
        new = ir.Value(name=old.name, shape=old.shape, type=old.type)
        tape.op("Range", [begin, tape("Add", limit, size), step], output=new)
        ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, [old], [new])
        return
    assert size.dtype is not None
    one = tape.number(1, size.dtype)
    there = tape("Squeeze", tape("Range", size, tape("Add", size, one), one))
    graph.insert_before(node, tape.nodes)
    for place, value in enumerate(node.inputs):
        if value is size:
            node.replace_input_with(place, there)
