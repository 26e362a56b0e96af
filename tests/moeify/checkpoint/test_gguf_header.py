from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from moeify.checkpoint.gguf_header import Place, check_header, check_layers
from moeify.errors import CheckpointError
from tests.moeify.checkpoint.make_gguf import put, write_gpt2, write_llama

SIZES = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
Q = gguf.GGMLQuantizationType
U32, U64 = "<I", "<Q"
ARRAY = b"tokenizer.ggml.tokens"


def number(key: str, value: int, layout: str = U32) -> Callable[[Path], None]:
    return lambda file: put(file, key.encode(), 4, layout, value)  # the type stands between key and value


def tensor(name: str, field: int, value: int, layout: str = U64) -> Callable[[Path], None]:
    """Fields of a matrix: 0 is the number of dimensions, 4 and 12 the dimensions, 20 the type, 24 the offset."""
    return lambda file: put(file, name.encode(), field, layout, value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_llama(tmp_path_factory.mktemp("gguf") / "m.gguf", {}, chats=True).read_bytes()


@pytest.fixture
def file(tmp_path: Path, whole: bytes) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    return path


@pytest.mark.parametrize("write", [write_gpt2, lambda path: write_llama(path, {"ffn_up": Q.Q8_0})])
def test_every_tensor_lies_where_the_library_says(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path / "m.gguf")
    places = check_header(path, SIZES)
    reader = gguf.GGUFReader(path)
    assert places == {
        tensor.name: Place(tensor.name, tuple(tensor.shape.tolist()[::-1]), begin, begin + int(tensor.n_bytes))
        for tensor in reader.tensors
        for begin in [int(tensor.data_offset) - int(reader.data_offset)]
    }


def test_the_other_byte_order_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert check_header(tmp_path / "m.gguf", SIZES) == {}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: put(file, b"", 0, U32, 7), "does not start with GGUF"),
        (lambda file: put(file, b"GGUF", 0, U32, 1), "its version is 1"),
        (lambda file: put(file, b"GGUF", 4, U64, 2**40), "tensors, expected at most"),
        (lambda file: put(file, b"GGUF", 12, U64, 2**40), "keys and"),
        (lambda file: put(file, b"GGUF", 12, U64, 10**6), "."),
        (lambda file: put(file, b"GGUF", 20, U64, 2**60), "announces 1152921504606846976 bytes"),
        (lambda file: put(file, ARRAY, 0, U32, 99), "there is no value type 99"),
        (lambda file: put(file, ARRAY, 8, U64, 2**40), "announces 1099511627776 texts, more than"),
        (lambda file: put(file, b"tokenizer.ggml.token_type", 8, U64, 2**40), "announces 4398046511104 bytes"),
        (lambda file: put(file, ARRAY, 4, U32, 9), "an array cannot hold values of type 9"),
        (lambda file: put(file, ARRAY, 16, U64, 2**40), "announces 1099511627776 bytes"),
        (number("llama.block_count", 0), "llama.block_count is 0, expected 1 to 10000"),
        (number("llama.block_count", 2**31), "llama.block_count is 2147483648"),
        (number("llama.attention.head_count", 0), "head_count is 0"),
        (number("llama.attention.head_count", 2**31), "head_count is 2147483648"),
        (number("llama.attention.head_count_kv", 0), "head_count_kv is 0"),
        (tensor("blk.0.ffn_up.weight", 0, 5, U32), "has 5 dimensions"),
        (tensor("blk.0.ffn_up.weight", 4, 0), "has the shape"),
        (tensor("blk.0.ffn_up.weight", 4, 2**40), "blk.0.ffn_down.weight overlaps another tensor"),
        (tensor("blk.0.ffn_up.weight", 20, 77, U32), "the quantization type 77"),
        (tensor("blk.0.ffn_up.weight", 20, Q.Q6_K, U32), "which its blocks of 256 values do not fill"),
        (tensor("blk.0.ffn_up.weight", 24, 4), "is no multiple of 32"),
        (tensor("blk.0.ffn_up.weight", 24, 0), "overlaps another tensor"),
        (tensor("blk.0.ffn_up.weight", 24, 2**40), "the tensors end at byte"),
        (lambda file: file.write_bytes(file.read_bytes().replace(b"ffn_gate", b"ffn_down")), "."),
        (lambda file: file.write_bytes(file.read_bytes().replace(b"blk.0.attn_k", b"blk.0.attn_v")), "the same name"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "the tensors end at byte"),
        (lambda file: file.write_bytes(b""), "empty file"),
    ],
)
def test_a_damaged_header(file: Path, spoil: Callable[[Path], None], reason: str) -> None:
    check_header(file, SIZES)
    spoil(file)
    with pytest.raises(CheckpointError, match=f"cannot be read as GGUF, or is truncated \\(.*{reason}") as caught:
        check_header(file, SIZES)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_there_twice(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"))
    with pytest.raises(CheckpointError, match=r"the key 'tokenizer\.ggml\.eos_token_id' is there twice"):
        check_header(file, SIZES)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_does_not_block(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"x\.gguf cannot be read: it is a "):
        check_header(tmp_path / "x.gguf", SIZES)


def test_whole_layers_are_not_left_out() -> None:
    check_layers(Path("m.gguf"), ["rope_freqs.weight", "blk.1.attn_rot_embd", "enc.blk.0.odd"], 2)
    for name in ("blk.2.attn_q.weight", "enc.blk.2.attn_q.weight"):
        with pytest.raises(CheckpointError, match=f"holds {name}, but its metadata says that there are 2 layers"):
            check_layers(Path("m.gguf"), [name], 2)
