"""An ONNX file on the disk: large weights lie beside it in `NAME.onnx.data`, since a protobuf holds 2 GB at most."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir

from moeify.errors import CheckpointError
from moeify.export.join import join
from moeify.export.onnx_file import DATA_SUFFIX

_IN_ONE_FILE = 500 * 10**6  # bytes; a protobuf holds 2 GB, and is built in memory by whoever reads it
_SMALLEST_OUTSIDE = 1024  # bytes; shapes and scalars stay in the graph, where shape inference sees them


def data_file(path: Path) -> Path:
    """Return where the weights of a large model lie."""
    return path.with_name(path.name + DATA_SUFFIX)


def write(model: ir.Model, path: Path) -> None:
    """Save a model over what is there, with large weights in a file beside it; they are read one at a time.

    Raises:
        CheckpointError: the disk has too little space.
    """
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    one_file = size <= _IN_ONE_FILE
    needed, free = size * (1 + one_file), shutil.disk_usage(path.parent).free
    if needed > free:
        raise CheckpointError(
            f"not enough space for {path.name}: {needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} are free"
        )
    data = data_file(path)
    data.unlink(missing_ok=True)
    ir.save(model, path, external_data=data.name, size_threshold_bytes=_SMALLEST_OUTSIDE)
    if one_file and data.exists():
        join(path, data)
