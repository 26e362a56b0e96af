"""Which values onnxruntime-gpu would copy between CPU and GPU, from the graph alone, as a table of what lies where.

The rules are those of ONNX Runtime: `Shape` and `Size` write on the CPU; a node stays there if all that it reads is
sizes and constants, unless its CUDA kernel itself reads them on the CPU. `benchmarks.gpu.onnx.place` holds them against
the real thing.
"""

from __future__ import annotations

from typing import Any

SOURCES = {"Shape", "Size"}
# Operators whose CUDA kernels read some inputs on the CPU, and which.
READ_ON_CPU = {
    "ConstantOfShape": {0}, "CumSum": {1}, "Expand": {1}, "OneHot": {1}, "Pad": {1, 3}, "Range": {0, 1, 2},
    "ReduceMax": {1}, "ReduceMean": {1}, "ReduceSum": {1}, "Reshape": {1}, "Slice": {1, 2, 3, 4}, "Split": {1},
    "Squeeze": {1}, "Tile": {1}, "TopK": {1}, "Trilu": {1}, "Unsqueeze": {1},
}  # fmt: skip


def copies(graph: Any) -> list[str]:
    """Name every input of a node of an ONNX graph that lies on the other side, as `Add(past)`."""
    constants = {tensor.name for tensor in graph.initializer}
    sizes, found = set[str](), []
    for node in graph.node:
        given = [(place, name) for place, name in enumerate(node.input) if name and name not in constants]
        if not given:
            constants.update(node.output)
            continue
        read_there = READ_ON_CPU.get(node.op_type, set())
        stays = all(name in sizes and place not in read_there for place, name in given)
        if node.op_type in SOURCES or stays:
            sizes.update(node.output)
            continue
        wrong = [name for place, name in given if (name in sizes) != (place in read_there)]
        found += [f"{node.op_type}({name})" for name in wrong]
    return found
