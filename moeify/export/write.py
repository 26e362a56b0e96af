"""An ONNX file that appears whole or not at all: written and proved in a hidden folder beside its place, then renamed.

Weights above `_IN_ONE_FILE` go into `NAME.onnx.data` beside it.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from moeify.errors import CheckpointError
from moeify.export.join import join

_IN_ONE_FILE = 500 * 10**6  # bytes; a protobuf holds 2 GB, and is built in memory by whoever reads it
_SMALLEST_OUTSIDE = 1024  # bytes; shapes and scalars stay in the graph, where shape inference sees them


def data_file(path: Path) -> Path:
    """Return where the weights of a large model lie."""
    return path.with_name(f"{path.name}.data")


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; it replaces `path` when the block ends, and nothing is left of it after an error.

    Args:
        path: The ONNX file; what is there now, and its data file, may be replaced.

    Raises:
        CheckpointError: `path` cannot be written, or the disk is full.
    """
    folder = path.with_name(f".{path.name}.moeify-partial")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder / path.name
        _swap_in(folder, path)
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        why = "the disk became full; free some space and run again" if full else error.strerror or str(error)
        raise CheckpointError(f"{path} cannot be written: {why}; nothing was left") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def _swap_in(folder: Path, path: Path) -> None:
    """Move the files to their places; a graph never stands beside weights that are not its own."""
    path.unlink(missing_ok=True)
    data_file(path).unlink(missing_ok=True)
    new_data = data_file(folder / path.name)
    if new_data.exists():
        new_data.rename(data_file(path))
    (folder / path.name).rename(path)
