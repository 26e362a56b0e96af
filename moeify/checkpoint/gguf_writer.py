"""Writing a GGUF file with the `gguf` library: tensor by tensor, each in parts, and read back in the end.

Parts that are repeated, such as the copies of an FFN, are read and quantized once.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from moeify.checkpoint.copy_bytes import STEP
from moeify.checkpoint.gguf_file import open_gguf
from moeify.checkpoint.nonfinite import tensor_holds_nonfinite
from moeify.checkpoint.safetensors_file import tensor_bytes
from moeify.checkpoint.shards import Compute, SourceRows
from moeify.checkpoint.source import Source
from moeify.checkpoint.tensor_info import torch_dtype
from moeify.errors import CheckpointError, RefusedError
from moeify.files.reading import opened

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter

TYPES = ("F32", "F16", "BF16", "Q8_0")
_KEPT_PARTS = 4


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write.

    Attributes:
        name: As llama.cpp calls it.
        kind: One of `TYPES`.
        shape: In torch's order.
        parts: What it consists of, in order along its first dimensions.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parts: tuple[SourceRows | Compute, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding.

        Raises:
            RefusedError: The rows are no whole blocks of the type.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        values, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        if self.shape[-1] % values:
            raise RefusedError(
                f"{self.kind.lower()} has blocks of {values} values, and {self.name} has rows of {self.shape[-1]}: "
                "choose --dtype float16, bfloat16 or float32"
            )
        return prod(self.shape) // values * nbytes


def write_gguf(
    source: Source,
    writer: GGUFWriter,
    path: Path,
    tensors: Sequence[GgufTensor],
    on_bytes: Callable[[int], None],
    on_nonfinite: Callable[[str], None],
) -> None:
    """Write a GGUF file, and read it back.

    Args:
        source: Where rows are copied from.
        writer: With all keys and values; what it knows of tensors is added here.
        path: The file.
        tensors: What to write, in order.
        on_bytes: Called with the number of bytes written since the last call.
        on_nonfinite: Called with the name of a tensor that holds NaN or Inf, once and before it is written; it may
            raise to stop.

    Raises:
        CheckpointError: The source is damaged, or the file does not hold what was written.
    """
    encoder = _Encoder(source, tensors, on_nonfinite)
    written: dict[str, str] = {}
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            streamed: Any = _Streamed(tensor, encoder, on_bytes)
            writer.write_tensor_data(streamed)
            written[tensor.name] = streamed.digest.hexdigest()
    finally:
        writer.close()
    _check_written(path, tensors, written)


def announce(writer: GGUFWriter, tensors: Sequence[GgufTensor]) -> None:
    """Tell a writer names, shapes and types, before any key that depends on them."""
    import numpy as np
    from gguf import GGMLQuantizationType

    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)


def part_values(source: Source, part: SourceRows | Compute) -> torch.Tensor:
    """Return the values of a part."""
    if not isinstance(part, SourceRows):
        return part()
    values = source.read(part.source_name)
    return values if part.rows is None else values[slice(*part.rows)]


class _Encoder:
    """Turns parts into bytes of a type, and keeps those that are needed again soon."""

    def __init__(self, source: Source, tensors: Sequence[GgufTensor], on_nonfinite: Callable[[str], None]) -> None:
        self._source, self._on_nonfinite = source, on_nonfinite
        self._uses = Counter((part, tensor.kind) for tensor in tensors for part in tensor.parts)
        self._kept: OrderedDict[tuple[SourceRows | Compute, str], memoryview] = OrderedDict()
        self._named: set[str] = set()

    def encoded(self, tensor: GgufTensor, part: SourceRows | Compute) -> memoryview:
        """Return the bytes of a part of a tensor."""
        key = (part, tensor.kind)
        if key in self._kept:
            return self._kept[key]
        values = part_values(self._source, part)
        plain = tensor.kind if tensor.kind != "Q8_0" else "F32"
        values = values.to(torch_dtype(plain)).reshape(-1, tensor.shape[-1]).contiguous()
        name = part.source_name if isinstance(part, SourceRows) else tensor.name
        if name not in self._named and tensor_holds_nonfinite(values):
            self._named.add(name)
            self._on_nonfinite(name)
        raw = tensor_bytes(values) if plain == tensor.kind else _quantized(values)
        if self._uses[key] > 1:
            self._kept[key] = raw
            if len(self._kept) > _KEPT_PARTS:
                self._kept.popitem(last=False)
        return raw


def _quantized(values: torch.Tensor) -> memoryview:
    from gguf import GGMLQuantizationType, quantize

    return quantize(values.numpy(), GGMLQuantizationType.Q8_0).reshape(-1).data


class _Streamed:
    """What the gguf library takes for an array, and writes: the parts of a tensor one after the other."""

    def __init__(self, tensor: GgufTensor, encoder: _Encoder, on_bytes: Callable[[int], None]) -> None:
        self.nbytes = tensor.nbytes
        self.digest = hashlib.blake2b()
        self._tensor, self._encoder, self._on_bytes = tensor, encoder, on_bytes

    def tofile(self, file: IO[bytes]) -> None:
        """Write the bytes, and note their digest."""
        size = 0
        for part in self._tensor.parts:
            raw = self._encoder.encoded(self._tensor, part)
            file.write(raw)
            self.digest.update(raw)
            self._on_bytes(len(raw))
            size += len(raw)
        if size != self.nbytes:
            raise ValueError(f"{self._tensor.name} needs {self.nbytes} bytes, its parts have {size}")


def _check_written(path: Path, tensors: Sequence[GgufTensor], written: dict[str, str]) -> None:
    """Read a file as others will, and compare each tensor with what was to be written.

    Raises:
        CheckpointError: A tensor is missing, or is another.
    """
    reader, places = open_gguf(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    with opened(path) as file:
        for tensor in tensors:
            read = found.pop(tensor.name, None)
            same = read is not None and (read.tensor_type.name, places[read.name].shape) == (tensor.kind, tensor.shape)
            if not same or read is None or _digest(file, int(read.data_offset), tensor.nbytes) != written[tensor.name]:
                raise CheckpointError(f"{tensor.name} is not in {path.name} as it was written: check the disk")
    if found:
        raise CheckpointError(f"{path.name} holds {next(iter(found))}, which was not written: check the disk")


def _digest(file: IO[bytes], start: int, size: int) -> str:
    digest = hashlib.blake2b()
    file.seek(start)
    for done in range(0, size, STEP):
        digest.update(file.read(min(STEP, size - done)))
    return digest.hexdigest()
