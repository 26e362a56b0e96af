"""CUDA graphs of exported decoders: what forbids them, and a copy of the file without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from benchmarks.gpu.onnx.models import is_decoder, one_more_token, text_inputs
from benchmarks.gpu.onnx.sessions import Bound, Session, milliseconds, open_session
from benchmarks.gpu.run import Run, first_line
from moeify.measure import relative_difference

BATCH, PAST, LENGTH = 2, 16, 32


def capturing_session(run: Run, path: Path) -> tuple[Session, bool]:
    """Return a session that captures what it runs, and whether the file had to be changed for it."""
    try:
        return open_session(run, path, graph=True), False
    except Exception as error:
        if "partitioned" not in str(error):
            raise
        changed = capturable(path)
        if changed == path:
            raise
        run.put("capture refused", reason=first_line(error)[-160:])
        return open_session(run, changed, graph=True), True


def capturable(path: Path) -> Path:
    """Return a file that a session can capture: a copy beside the weights, or the same file if nothing is in the way.

    Positions are Range(0, n) on the GPU plus a size on the CPU, whose copy to the GPU forbids the capture.
    Range(size, n + size) is the same without a copy.
    """
    model = onnx.load(path, load_external_data=False)
    nodes: Any = model.graph.node
    makers = {name: node for node in nodes for name in node.output}
    sizes = {node.output[0] for node in nodes if node.op_type == "Squeeze" and _is_shape(makers.get(node.input[0]))}
    changed = False
    for place, node in reversed(list(enumerate(nodes))):
        found = _range_and_size(node, makers, sizes)
        if found is not None:
            nodes.remove(node)
            for offset, new in enumerate(_shifted(*found, list(node.output))):
                nodes.insert(place + offset, new)
            changed = True
    if not changed:
        return path
    copy = path.with_name(f"{path.stem}.capturable.onnx")
    onnx.save(model, copy)
    return copy


def _is_shape(node: Any) -> bool:
    return node is not None and node.op_type == "Shape"


def _range_and_size(node: Any, makers: dict[str, Any], sizes: set[str]) -> tuple[Any, str] | None:
    """Return the Range and the size that an Add adds, None for any other node."""
    if node.op_type == "Add":
        for count, size in (node.input, reversed(node.input)):
            source = makers.get(count)
            if source is not None and source.op_type == "Range" and size in sizes:
                return source, size
    return None


def _shifted(source: Any, size: str, outputs: list[str]) -> tuple[Any, Any]:
    end = f"{outputs[0]}_end"
    add = helper.make_node("Add", [source.input[1], size], [end])
    return add, helper.make_node("Range", [size, end, source.input[2]], outputs)


def capture(run: Run, path: Path) -> None:
    """Capture a model as a CUDA graph, replay it with other inputs, and compare with a plain session."""
    plain = open_session(run, path)
    session, changed = capturing_session(run, path)

    def inputs(seed: int) -> Any:
        decoder = is_decoder(plain)
        return one_more_token(run, plain, BATCH, PAST, seed) if decoder else text_inputs(BATCH, LENGTH, 0, seed)

    replayed, direct = Bound(run, session, inputs(1)), Bound(run, plain, inputs(1))
    for _ in range(3):  # the first runs allocate, one captures
        replayed.run()
    worst = 0.0
    for seed in (2, 3):
        for bound in (replayed, direct):
            bound.fill(inputs(seed))
        first, second = replayed.run(), direct.run()
        worst = max(worst, *(relative_difference(first[name], second[name]) for name in first))
    run.put(
        "graph", changed=changed, difference=worst, equal=worst == 0,
        replay_ms=milliseconds(run.device, replayed.run), plain_ms=milliseconds(run.device, direct.run),
    )  # fmt: skip
