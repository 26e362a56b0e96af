"""Writing a checkpoint: bytes go from the source's files to the output's files without being decoded.

Memory is bounded by a buffer and a few computed tensors, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from io import FileIO
from pathlib import Path

from moeify.checkpoint.copy_bytes import copy_span, same_bytes, same_span, write_all
from moeify.checkpoint.folder import SAFETENSORS, index_name
from moeify.checkpoint.nonfinite import holds_nonfinite, tensor_holds_nonfinite
from moeify.checkpoint.safetensors_file import encode_header, tensor_bytes
from moeify.checkpoint.shards import Compute, OutTensor, Shard, SourceRows, plan_shards
from moeify.checkpoint.source import Source
from moeify.checkpoint.tensor_info import Span, TensorInfo, dtype_name
from moeify.checkpoint.workers import write_with_workers
from moeify.errors import CheckpointError
from moeify.files.reading import read_bytes
from moeify.files.staging import RESUME_RECORD

_KEPT_PARTS = 4  # gate, up and down of one FFN, and one more


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
    workers: int = 1,
) -> None:
    """Write `tensors` into `dst_dir` as safetensors, with an index if one file is not enough, and the side files.

    Args:
        source: Where rows are copied from.
        tensors: What to write, in order.
        dst_dir: An existing folder; see `staged_folder` for one that appears whole or not at all.
        shard_size: Bytes of values that a file may hold.
        resume: Keep the shards of an interrupted run that hold what is to be written; remove what else is in `dst_dir`.
        on_bytes: Called with the number of bytes written since the last call.
        on_nonfinite: Called with the name of a source or computed tensor that holds NaN or Inf, once and before its
            first byte is written; it may raise to stop.
        workers: Processes that write; the files are the same for any number.
        plan_key: What computed parts depend on beside the source, such as the plan; `resume` needs an equal one.

    Raises:
        CheckpointError: The source is damaged or lacks a tensor, or its tokenizer cannot be built.
        ValueError: A tensor's parts do not make up its dtype and shape.
    """
    shards = plan_shards(tensors, shard_size)
    _check_parts(source, tensors)
    fingerprint = _plan_fingerprint(source, shards, plan_key)
    if resume:
        _keep_shards(dst_dir, fingerprint, shards)
    (dst_dir / RESUME_RECORD).write_text(fingerprint)
    source.write_side_files(dst_dir)  # before hours of writing, as it may be refused
    _write_shards(shards, partial(_ShardWriter, source, tensors, dst_dir), workers, on_bytes, on_nonfinite)
    if len(shards) > 1:
        write_index(dst_dir, shards)


def _write_shards(
    shards: Sequence[Shard],
    writer: Callable[[Callable[[int], None], Callable[[str], None]], _ShardWriter],
    workers: int,
    on_bytes: Callable[[int], None],
    on_nonfinite: Callable[[str], None],
) -> None:
    left = write_with_workers(shards, workers, writer, on_bytes, on_nonfinite) if workers > 1 else shards
    here = writer(on_bytes, on_nonfinite)
    for shard in left:
        here.write(shard)


def _check_parts(source: Source, tensors: Iterable[OutTensor]) -> None:
    """Check what is known before anything is computed: the tensors whose parts are all copied."""
    for tensor in tensors:
        size, copied = 0, [part for part in tensor.parts if isinstance(part, SourceRows)]
        for part in copied:
            info = source.info(part.source_name)
            if info.dtype != tensor.dtype:
                raise ValueError(f"{tensor.name} is {tensor.dtype}, but its part {info.name} is {info.dtype}")
            size += _bytes_of_rows(info, part)[1]
        if len(copied) == len(tensor.parts):
            _check_size(tensor, size)


def _check_size(tensor: OutTensor, size: int) -> None:
    if size != tensor.nbytes:
        raise ValueError(f"{tensor.name} needs {tensor.nbytes} bytes, its parts have {size}")


def _bytes_of_rows(info: TensorInfo, part: SourceRows) -> tuple[int, int]:
    """Return where the rows begin among the bytes of their tensor, and how many bytes they have."""
    if part.rows is None:
        return 0, info.nbytes
    start, stop = part.rows
    if not info.shape or not 0 <= start <= stop <= info.shape[0]:
        raise ValueError(f"{info.name} of shape {list(info.shape)} has no rows {start} to {stop}")
    row = info.nbytes // max(info.shape[0], 1)
    return start * row, (stop - start) * row


def _plan_fingerprint(source: Source, shards: Iterable[Shard], plan_key: str) -> str:
    plan = [
        (shard.name, [(t.name, t.dtype, t.shape, [_describe(part) for part in t.parts]) for t in shard.tensors])
        for shard in shards
    ]
    return hashlib.sha256(json.dumps([source.fingerprint(), plan_key, plan]).encode()).hexdigest()


def _describe(part: SourceRows | Compute) -> list[object]:
    return [part.source_name, part.rows] if isinstance(part, SourceRows) else ["computed"]


def _keep_shards(folder: Path, fingerprint: str, shards: Iterable[Shard]) -> None:
    """Keep the shards of an interrupted run if it followed the same plan, and remove everything else."""
    same = False
    with suppress(CheckpointError):
        same = read_bytes(folder / RESUME_RECORD, len(fingerprint)) == fingerprint.encode()
    kept = {shard.name for shard in shards} if same else set()
    for old in folder.iterdir():
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        elif old.name not in kept or not old.is_file() or old.is_symlink():
            old.unlink()


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write which file holds which tensor."""
    index = {
        "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
        "weight_map": {tensor.name: shard.name for shard in shards for tensor in shard.tensors},
    }
    (folder / index_name(SAFETENSORS)).write_text(json.dumps(index, indent=2) + "\n")


class _ShardWriter:
    """A writer of shards: spans are copied, other parts are computed and kept while they are needed again."""

    def __init__(
        self,
        source: Source,
        tensors: Sequence[OutTensor],
        folder: Path,
        on_bytes: Callable[[int], None],
        on_nonfinite: Callable[[str], None],
    ) -> None:
        self._source, self._folder = source, folder
        self._on_bytes = on_bytes
        self._on_nonfinite = on_nonfinite
        self._uses = Counter(part for tensor in tensors for part in tensor.parts)
        self._kept: OrderedDict[SourceRows | Compute, memoryview] = OrderedDict()
        self._checked: set[str] = set()

    def write(self, shard: Shard) -> None:
        """Write one shard, unless an interrupted run has written it as it is to be."""
        header = encode_header(tensor.info for tensor in shard.tensors)
        path = self._folder / shard.name
        if path.exists() and self._holds(path, header, shard):
            self._on_bytes(len(header) + shard.nbytes)
            return
        begun = self._folder / f".{shard.name}.partial"
        with begun.open("wb", buffering=0) as file:
            write_all(file, memoryview(header))
            self._on_bytes(len(header))
            for tensor in shard.tensors:
                self._write_tensor(tensor, file)
        begun.rename(path)

    def _holds(self, path: Path, header: bytes, shard: Shard) -> bool:
        """Compare a file with what would be written: after a power cut, or by another hand, it may hold anything."""
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != len(header) + shard.nbytes:
                return False
            return same_bytes(memoryview(header), file) and all(
                self._same_part(tensor, part, file) for tensor in shard.tensors for part in tensor.parts
            )

    def _same_part(self, tensor: OutTensor, part: SourceRows | Compute, file: FileIO) -> bool:
        span = self._span(part)
        if span is None:
            return same_bytes(self._bytes(tensor, part), file)
        self._check_finite(part)
        return same_span(span, file)

    def _write_tensor(self, tensor: OutTensor, file: FileIO) -> None:
        start = file.tell()
        for part in tensor.parts:
            span = self._span(part)
            if span is not None:
                self._check_finite(part)
                copy_span(span, file, self._on_bytes)
            else:
                raw = self._bytes(tensor, part)
                write_all(file, raw)
                self._on_bytes(len(raw))
        _check_size(tensor, file.tell() - start)

    def _check_finite(self, part: SourceRows | Compute) -> None:
        """Look for NaN and Inf in the source tensor of a part, the first time that it is used."""
        if isinstance(part, SourceRows) and part.source_name not in self._checked:
            self._checked.add(part.source_name)
            if holds_nonfinite(self._source, part.source_name):
                self._on_nonfinite(part.source_name)

    def _span(self, part: SourceRows | Compute) -> Span | None:
        """Return where the values of a part lie as they are on disk, or None if they do not."""
        if not isinstance(part, SourceRows):
            return None
        whole = self._source.span(part.source_name)
        if whole is None:
            return None
        begin, nbytes = _bytes_of_rows(self._source.tensors[part.source_name], part)
        return Span(whole.path, whole.offset + begin, nbytes)

    def _bytes(self, tensor: OutTensor, part: SourceRows | Compute) -> memoryview:
        if part in self._kept:
            return self._kept[part]
        if isinstance(part, SourceRows):
            name, values = part.source_name, self._source.read(part.source_name)
        else:
            name, values = tensor.name, part()
        if dtype_name(values.dtype) != tensor.dtype:
            raise ValueError(f"{tensor.name} is {tensor.dtype}, but its part {name} is {values.dtype}")
        if name not in self._checked:
            self._checked.add(name)
            if tensor_holds_nonfinite(values):
                self._on_nonfinite(name)
        if isinstance(part, SourceRows) and part.rows is not None:
            values = values[slice(*part.rows)]
        raw = tensor_bytes(values)
        if self._uses[part] > 1:
            self._kept[part] = raw
            if len(self._kept) > _KEPT_PARTS:
                self._kept.popitem(last=False)
        return raw
