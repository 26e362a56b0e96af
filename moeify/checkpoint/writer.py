"""Writing a checkpoint: bytes go from the source's files to the output's files without being decoded.

Memory is bounded by a buffer and a few computed tensors, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from io import FileIO
from math import prod
from pathlib import Path

from moeify.checkpoint.copy_bytes import copy_span, write_all
from moeify.checkpoint.folder import SAFETENSORS, index_name
from moeify.checkpoint.nonfinite import count_nonfinite, count_nonfinite_tensor
from moeify.checkpoint.safetensors_file import encode_header, tensor_bytes
from moeify.checkpoint.shards import Compute, OutTensor, Part, Shard, plan_shards
from moeify.checkpoint.source import Source
from moeify.checkpoint.tensor_info import ITEMSIZE, Span, dtype_name

RESUME_RECORD = ".moeify-resume"
_KEPT_PIECES = 4  # gate, up, down of one FFN, and one more


def write_checkpoint(
    source: Source,
    tensors: Sequence[OutTensor],
    dst_dir: Path,
    *,
    shard_size: int,
    resume: bool,
    on_bytes: Callable[[int], None],
    on_nonfinite: Callable[[str], None],
    plan_key: str = "",
) -> None:
    """Writes `tensors` into `dst_dir` as safetensors, with an index where one file is not enough.

    Args:
        source: where parts are copied from.
        tensors: what to write, in order.
        dst_dir: an existing folder; see `staged` for one that appears whole or not at all.
        shard_size: bytes of values a file may hold.
        resume: keep the whole shards that an interrupted run of the same plan left in `dst_dir`.
        on_bytes: called with the number of bytes written since the last call.
        on_nonfinite: called with the name of a source or computed tensor that holds NaN or Inf, once each, before
            its first byte is written; it may raise to stop.
        plan_key: everything that computed parts depend on beside the source, such as the plan as JSON: shards are only
            kept if it is the same.

    Raises:
        CheckpointError: the source is damaged or lacks a tensor.
        ValueError: a tensor's parts do not make up its dtype and shape.
    """
    shards = plan_shards(tensors, shard_size)
    for tensor in tensors:
        _check_parts(source, tensor)
    _start_or_resume(dst_dir, _plan_fingerprint(source, shards, plan_key), resume=resume)
    pieces = _Pieces(source, tensors, on_nonfinite)
    for shard in shards:
        header = encode_header(tensor.info for tensor in shard.tensors)
        path = dst_dir / shard.name
        # A file has this name only once it is whole.
        if path.exists():
            for part in (part for tensor in shard.tensors for part in tensor.parts):
                pieces.check(part)
            on_bytes(len(header) + shard.nbytes)
            continue
        partial = dst_dir / f".{shard.name}.partial"
        with partial.open("wb", buffering=0) as file:
            write_all(file, memoryview(header))
            on_bytes(len(header))
            for tensor in shard.tensors:
                pieces.write(tensor, file, on_bytes)
        partial.rename(path)
    if len(shards) > 1:
        _write_index(dst_dir, shards)


def _check_parts(source: Source, tensor: OutTensor) -> None:
    """Checks what can be known before anything is computed."""
    size = 0
    for part in tensor.parts:
        if not isinstance(part, Part):
            return
        info = source.info(part.source_name)
        if info.dtype != tensor.dtype:
            raise ValueError(f"{tensor.name} is {tensor.dtype}, but its part {info.name} is {info.dtype}")
        size += prod(_part_shape(info.shape, part)) * ITEMSIZE[info.dtype]
    if size != tensor.nbytes:
        raise ValueError(f"{tensor.name} needs {tensor.nbytes} bytes, its parts have {size}")


def _part_shape(shape: tuple[int, ...], part: Part) -> tuple[int, ...]:
    if part.rows is None:
        return shape
    start, stop = part.rows
    if not shape or not 0 <= start <= stop <= shape[0]:
        raise ValueError(f"{part.source_name} of shape {list(shape)} has no rows {start} to {stop}")
    return (stop - start, *shape[1:])


def _plan_fingerprint(source: Source, shards: Iterable[Shard], plan_key: str) -> str:
    plan = [
        (shard.name, [(t.name, t.dtype, t.shape, [_recipe(part) for part in t.parts]) for t in shard.tensors])
        for shard in shards
    ]
    return hashlib.sha256(json.dumps([source.fingerprint(), plan_key, plan]).encode()).hexdigest()


def _recipe(part: Part | Compute) -> list[object]:
    return [part.source_name, part.rows] if isinstance(part, Part) else ["computed"]


def _start_or_resume(folder: Path, fingerprint: str, *, resume: bool) -> None:
    record = folder / RESUME_RECORD
    if resume and record.is_file() and record.read_text() == fingerprint:
        return
    for old in folder.glob("*.safetensors"):
        old.unlink()
    record.write_text(fingerprint)


def _write_index(folder: Path, shards: Sequence[Shard]) -> None:
    index = {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": {tensor.name: shard.name for shard in shards for tensor in shard.tensors},
    }
    (folder / index_name(SAFETENSORS)).write_text(json.dumps(index, indent=2) + "\n")


class _Pieces:
    """Turns parts into bytes in a file: spans are copied, the rest is computed and kept while it is needed again."""

    def __init__(self, source: Source, tensors: Sequence[OutTensor], on_nonfinite: Callable[[str], None]) -> None:
        self._source = source
        self._on_nonfinite = on_nonfinite
        self._uses = Counter(part for tensor in tensors for part in tensor.parts)
        self._kept: OrderedDict[Part | Compute, memoryview] = OrderedDict()
        self._checked: set[str] = set()

    def write(self, tensor: OutTensor, file: FileIO, on_bytes: Callable[[int], None]) -> None:
        """Appends the parts of one tensor."""
        start = file.tell()
        for part in tensor.parts:
            span = self._span(part)
            if span is not None:
                self.check(part)
                copy_span(span, file, on_bytes)
            else:
                raw = self._bytes(tensor, part)
                write_all(file, raw)
                on_bytes(len(raw))
        if file.tell() - start != tensor.nbytes:
            raise ValueError(f"{tensor.name} needs {tensor.nbytes} bytes, its parts have {file.tell() - start}")

    def check(self, part: Part | Compute) -> None:
        """Looks for NaN and Inf in the source tensor of a part, the first time it is met."""
        if isinstance(part, Part) and part.source_name not in self._checked:
            self._checked.add(part.source_name)
            if count_nonfinite(self._source, part.source_name):
                self._on_nonfinite(part.source_name)

    def _span(self, part: Part | Compute) -> Span | None:
        """Where the part lies verbatim on disk, if it does."""
        whole = self._source.span(part.source_name) if isinstance(part, Part) else None
        if whole is None or not isinstance(part, Part) or part.rows is None:
            return whole
        start, stop = part.rows
        row = whole.nbytes // self._source.tensors[part.source_name].shape[0]
        return Span(whole.path, whole.offset + start * row, (stop - start) * row)

    def _bytes(self, tensor: OutTensor, part: Part | Compute) -> memoryview:
        if part in self._kept:
            return self._kept[part]
        piece = self._source.read(part.source_name) if isinstance(part, Part) else part()
        name = part.source_name if isinstance(part, Part) else tensor.name
        if dtype_name(piece.dtype) != tensor.dtype:
            raise ValueError(f"{tensor.name} is {tensor.dtype}, but its part {name} is {piece.dtype}")
        if name not in self._checked:
            self._checked.add(name)
            if count_nonfinite_tensor(piece):
                self._on_nonfinite(name)
        if isinstance(part, Part) and part.rows is not None:
            piece = piece[slice(*part.rows)]
        raw = tensor_bytes(piece)
        if self._uses[part] > 1:
            self._kept[part] = raw
            if len(self._kept) > _KEPT_PIECES:
                self._kept.popitem(last=False)
        return raw
