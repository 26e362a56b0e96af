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
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path

from moeify.checkpoint.copy_bytes import copy_span, same_bytes, same_span, synced_meanwhile, write_all
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

DEPENDS_ON = ("source", "plan, settings or dtype", "--shard-size")
_KEPT_PARTS = 4  # gate, up and down of one FFN, and one more


@dataclass(frozen=True)
class Files:
    """What is to be written: whole, or a part of it.

    Attributes:
        source: Where rows are copied from.
        shards: The files.
        fingerprint: What they depend on, a line for each of `DEPENDS_ON`: a digest.
    """

    source: Source
    shards: tuple[Shard, ...]
    fingerprint: str

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""
        return sum(len(_header(shard)) + shard.nbytes for shard in self.shards)


def plan_files(source: Source, tensors: Sequence[OutTensor], shard_size: int, plan_key: str = "") -> Files:
    """Cut tensors into files, and check what is known before anything is computed.

    Args:
        source: Where rows are copied from.
        tensors: What to write, in order.
        shard_size: Bytes of values that a file may hold.
        plan_key: What computed parts depend on beside the source, such as the plan.

    Raises:
        CheckpointError: The source lacks a tensor.
        ValueError: A tensor's parts do not make up its dtype and shape.
    """
    _check_parts(source, tensors)
    shards = tuple(plan_shards(tensors, shard_size))
    return Files(source, shards, _fingerprint(source, shards, plan_key))


def write_shards(
    files: Files,
    folder: Path,
    *,
    resume: bool,
    on_bytes: Callable[[int], None],
    on_nonfinite: Callable[[str], None],
    workers: int = 1,
) -> None:
    """Write shards as safetensors, and the side files, into a folder.

    Args:
        files: What to write.
        folder: An existing folder; see `staged_folder` for one that appears whole or not at all.
        resume: Keep the shards of an interrupted run that hold what is to be written; remove what else is in `folder`.
        on_bytes: Called with the number of bytes written since the last call.
        on_nonfinite: Called with the name of a source or computed tensor that holds NaN or Inf, once and before its
            first byte is written; it may raise to stop.
        workers: Processes that write; the files are the same for any number.

    Raises:
        CheckpointError: The source is damaged, or its tokenizer cannot be built.
    """
    if resume:
        _keep_shards(folder, files)
    (folder / RESUME_RECORD).write_text(files.fingerprint)
    files.source.write_side_files(folder)  # before hours of writing, as it may be refused
    writer = partial(_ShardWriter, files, folder)
    left: Sequence[Shard] = files.shards
    if workers > 1:
        left = write_with_workers(files.shards, workers, writer, on_bytes, on_nonfinite)
    here = writer(on_bytes, on_nonfinite)
    for shard in left:
        here.write(shard)


def holds_header(path: Path, shard: Shard) -> bool:
    """Return whether a file has the size and the header of a shard; its values are not read."""
    with path.open("rb", buffering=0) as file:
        return _has_header(file, shard)


def _has_header(file: FileIO, shard: Shard) -> bool:
    header = _header(shard)
    size = os.fstat(file.fileno()).st_size
    return size == len(header) + shard.nbytes and same_bytes(memoryview(header), file)


def _header(shard: Shard) -> bytes:
    return encode_header(tensor.info for tensor in shard.tensors)


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


def _fingerprint(source: Source, shards: Iterable[Shard], plan_key: str) -> str:
    plan = [
        (shard.name, [(t.name, t.dtype, t.shape, [_describe(part) for part in t.parts]) for t in shard.tensors])
        for shard in shards
    ]
    each = (source.fingerprint(), plan_key, json.dumps(plan))
    return "".join(f"{hashlib.sha256(text.encode()).hexdigest()}\n" for text in each)


def _describe(part: SourceRows | Compute) -> list[object]:
    return [part.source_name, part.rows] if isinstance(part, SourceRows) else ["computed"]


def _keep_shards(folder: Path, files: Files) -> None:
    """Keep the shards of an interrupted run if it followed the same plan, and remove everything else."""
    same = False
    with suppress(CheckpointError):
        same = read_bytes(folder / RESUME_RECORD, len(files.fingerprint)) == files.fingerprint.encode()
    kept = {shard.name for shard in files.shards} if same else set()
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
        files: Files,
        folder: Path,
        on_bytes: Callable[[int], None],
        on_nonfinite: Callable[[str], None],
    ) -> None:
        self._source, self._folder = files.source, folder
        self._on_bytes = on_bytes
        self._on_nonfinite = on_nonfinite
        self._uses = Counter(part for shard in files.shards for tensor in shard.tensors for part in tensor.parts)
        self._kept: OrderedDict[SourceRows | Compute, memoryview] = OrderedDict()
        self._checked: set[str] = set()

    def write(self, shard: Shard) -> None:
        """Write one shard, unless an interrupted run has written it as it is to be."""
        header = _header(shard)
        path = self._folder / shard.name
        if path.exists() and self._holds(path, shard):
            self._on_bytes(len(header) + shard.nbytes)
            return
        begun = self._folder / f".{shard.name}.partial"
        with begun.open("wb", buffering=0) as file, synced_meanwhile(file):
            write_all(file, memoryview(header))
            self._on_bytes(len(header))
            for tensor in shard.tensors:
                self._write_tensor(tensor, file)
        begun.rename(path)

    def _holds(self, path: Path, shard: Shard) -> bool:
        """Compare a file with what would be written: after a power cut, or by another hand, it may hold anything."""
        with path.open("rb", buffering=0) as file:
            return _has_header(file, shard) and all(
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
