"""A GGUF file is written in parts, each part once, and read back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moeify.checkpoint import gguf_writer
from moeify.checkpoint.gguf_file import open_gguf
from moeify.checkpoint.gguf_writer import GgufTensor, announce, write_gguf
from moeify.checkpoint.shards import SourceRows
from moeify.checkpoint.source import Source, open_source
from moeify.errors import CheckpointError, RefusedError

VALUES = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
HALF, WHOLE = SourceRows("a", (0, 3)), SourceRows("a")


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    (tmp_path / "src").mkdir()
    save_file({"a": VALUES, "large": VALUES * 1e6, "nan": VALUES / 0}, tmp_path / "src" / "model.safetensors")
    (tmp_path / "src" / "config.json").write_text('{"model_type": "llama"}')
    with open_source(tmp_path / "src") as opened:
        yield opened


def write(source: Source, path: Path, *tensors: GgufTensor) -> tuple[dict[str, Any], int, list[str]]:
    """What is in the file, the bytes that were told, and the names that were."""
    writer, told, named = gguf.GGUFWriter(None, "llama"), [], []  # type: ignore[var-annotated]
    announce(writer, tensors)
    write_gguf(source, writer, path, tensors, told.append, named.append)
    read = gguf.GGUFReader(path)
    found = {t.name: (t.tensor_type.name, gguf.dequantize(t.data, t.tensor_type)) for t in read.tensors}
    return found, sum(told), named


def test_parts_follow_each_other(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, reads = source.read, list[str]()

    def counted(name: str) -> torch.Tensor:
        reads.append(name)
        return read(name)

    monkeypatch.setattr(source, "read", counted)
    stacked = GgufTensor("stack", "F32", (4, 3, 32), (HALF,) * 4)
    computed = GgufTensor("sum", "BF16", (9, 32), (WHOLE, lambda: VALUES[:3] + 1))
    found, told, named = write(source, tmp_path / "x.gguf", stacked, computed)
    assert told == stacked.nbytes + computed.nbytes == 4 * 3 * 32 * 4 + 9 * 32 * 2 and named == []
    assert reads == ["a", "a"]  # once for each of the two
    np.testing.assert_array_equal(found["stack"][1], np.stack([VALUES[:3].numpy()] * 4))
    expected = torch.cat([VALUES, VALUES[:3] + 1]).bfloat16().float().numpy()
    np.testing.assert_array_equal(found["sum"][1], expected)


def test_q8_0(source: Source, tmp_path: Path) -> None:
    """Each row of 32 is one block: a scale of 16 bits, and whole numbers to 127."""
    found, _, _ = write(source, tmp_path / "x.gguf", GgufTensor("a", "Q8_0", (6, 32), (WHOLE,)))
    kind, values = found["a"]
    assert kind == "Q8_0" and (tmp_path / "x.gguf").stat().st_size < 6 * 32 * 4
    for row, got in zip(VALUES.numpy(), values, strict=True):
        scale = np.abs(row).max() / 127
        np.testing.assert_array_equal(got, np.float32(np.float16(scale)) * np.rint(row / scale))
    with pytest.raises(RefusedError, match=r"q8_0 has blocks of 32 values, and b has rows of 33: choose --dtype"):
        _ = GgufTensor("b", "Q8_0", (6, 33), ()).nbytes


def test_what_is_no_number_in_the_type_is_told(source: Source, tmp_path: Path) -> None:
    large = GgufTensor("large", "F16", (6, 32), (SourceRows("large"),))
    twice = [GgufTensor(name, "F32", (6, 32), (SourceRows("nan"),)) for name in ("x", "y")]
    assert write(source, tmp_path / "x.gguf", large, *twice)[2] == ["large", "nan"]


def test_parts_that_do_not_fill_a_tensor_are_a_bug(source: Source, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a needs 768 bytes, its parts have 384"):
        write(source, tmp_path / "x.gguf", GgufTensor("a", "F32", (6, 32), (HALF,)))


def test_a_disk_that_holds_something_else_is_noticed(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(path: Path) -> Any:
        raw = bytearray(path.read_bytes())
        raw[-40] ^= 1  # in the last tensor
        path.write_bytes(raw)
        return open_gguf(path)

    monkeypatch.setattr(gguf_writer, "open_gguf", damaged)
    with pytest.raises(CheckpointError, match=r"a is not in x\.gguf as it was written"):
        write(source, tmp_path / "x.gguf", GgufTensor("a", "F32", (6, 32), (WHOLE,)))
