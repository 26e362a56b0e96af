from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from moeify.checkpoint.safetensors_file import SafetensorsFiles, encode_header, tensor_bytes
from moeify.checkpoint.tensor_info import ITEMSIZE, TensorInfo, torch_dtype
from moeify.errors import CheckpointError

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9).filter(lambda s: s != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
headers = st.dictionaries(names, st.tuples(st.sampled_from(sorted(ITEMSIZE)), shapes), max_size=6)


def random_bits(dtype: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Any bit pattern, NaN payloads included; a bool may only be 0 or 1."""
    high = 2 if dtype == "BOOL" else 256
    size = TensorInfo("", dtype, shape).nbytes
    raw = torch.randint(0, high, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(torch_dtype(dtype)).reshape(shape)


def random_tensors(header: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: random_bits(dtype, shape, generator) for name, (dtype, shape) in header.items()}


def assert_same_bits(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert mine.dtype == theirs.dtype
    assert mine.shape == theirs.shape
    assert bytes(tensor_bytes(mine)) == bytes(tensor_bytes(theirs))


@given(headers)
@settings(max_examples=60, deadline=None)
def test_reads_what_the_library_writes(header: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    tensors = random_tensors(header)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path, metadata={"note": "any"})
        files = SafetensorsFiles([path])
        assert files.tensors.keys() == tensors.keys()
        for name, expected in tensors.items():
            assert_same_bits(files.read(name), expected)
            span = files.span(name)
            assert span is not None
            assert path.read_bytes()[span.offset : span.offset + span.nbytes] == bytes(tensor_bytes(expected))


@given(headers)
@settings(max_examples=60, deadline=None)
def test_the_library_reads_what_we_write(header: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    by_width = dict(sorted(header.items(), key=lambda item: -ITEMSIZE[item[1][0]]))
    tensors = random_tensors(by_width)
    encoded = encode_header(TensorInfo(name, dtype, shape) for name, (dtype, shape) in by_width.items())
    assert len(encoded) % 8 == 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(encoded + b"".join(map(tensor_bytes, tensors.values())))
        loaded = load_file(path)
        assert loaded.keys() == tensors.keys()
        for name, expected in tensors.items():
            assert_same_bits(loaded[name], expected)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def put(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry()}, 4, "truncated: the tensors need 8 bytes, the file holds 4"),
        ({"a": entry()}, 12, "4 bytes follow the last tensor"),
        ({"a": entry(offsets=(8, 0))}, 8, "a has an impossible shape"),
        ({"a": entry(offsets=(-8, 0))}, 8, "a has an impossible shape"),
        ({"a": entry(shape=(-2,), offsets=(0, 8))}, 8, "a has an impossible shape"),
        ({"a": entry(shape=(True,), offsets=(0, 4))}, 4, "a has an impossible shape"),
        ({"a": entry(shape=(3,))}, 8, r"a takes 8 bytes where F32\[3\] needs 12"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "b overlaps the tensor before it"),
        ({"a": entry(), "b": entry()}, 8, "overlaps the tensor before it"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "b leaves a gap before it"),
        ({"a": entry(dtype="F3")}, 8, "a has the unknown dtype 'F3'"),
        ({"a": entry(dtype=["F32"])}, 8, "a has the unknown dtype"),
        ({"a": {"dtype": "F32"}}, 8, "the entry of a has no dtype, shape and two data_offsets"),
        ({"a": 7}, 8, "the entry of a has no dtype, shape and two data_offsets"),
        ({"a": entry(shape=None)}, 8, "the entry of a has no dtype"),
        ([1], 0, "its header is not a JSON object"),
        ({"a": entry(), "__metadata__": ["pt"]}, 8, "__metadata__ is not a map from texts to texts"),
        ({"a": entry(), "__metadata__": {"format": 1}}, 8, "__metadata__ is not a map from texts to texts"),
        ({"a": entry(shape=(2**63, 0), offsets=(0, 0))}, 0, "a has an impossible shape"),
        ({"a": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}, 0, "a has an impossible shape"),
        ({"a": entry(shape=(1,) * 65, offsets=(0, 4))}, 4, "a has 65 dimensions"),
        ({"a": {**entry(), "more": float("nan")}}, 8, "NaN is not a number of JSON"),
    ],
)
def test_a_header_that_contradicts_itself(tmp_path: Path, header: Any, size: int, message: str) -> None:
    path = tmp_path / "model.safetensors"
    put(path, json.dumps(header).encode(), bytes(size))
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFiles([path])
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "does not start with a safetensors header"),
        (lambda path: path.write_bytes(b"PK\x03\x04" * 100), "does not start with a safetensors header"),
        (lambda path: path.write_bytes((99).to_bytes(8, "little") + b"{}"), "the header ends at byte 107, the file"),
        (lambda path: put(path, b"{nonsense", b""), "not valid JSON"),
        (lambda path: put(path, b"\xff\xfe", b""), "not valid JSON"),
        (lambda path: put(path, b'{"a": 1, "a": 2}', b""), "a is there twice"),
        (lambda path: put(path, b"\xef\xbb\xbf{}", b""), "BOM"),
        (lambda path: put(path, "{}".encode("utf-16"), b""), "not valid JSON"),
        (
            lambda path: put(path, b'{"\\ud800": 1}', b""),
            "surrogates",
        ),
        (lambda path: put(path, b'{"a":' * 9_999, b""), "nested more than 64 deep"),
        (lambda path: put(path, b'{"a": ' + b"1" * 9_999 + b"}", b""), "more than 300 digits"),
        (lambda path: os.mkfifo(path), "it is a pipe"),
    ],
)
def test_a_file_that_is_not_safetensors(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "model.safetensors"
    write(path)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFiles([path])


def agrees(path: Path) -> bool:
    """Whether the safetensors library refuses a file too."""
    try:
        load_file(path)
    except SafetensorError:
        return True
    return False


@pytest.mark.parametrize(
    "header",
    ['{"__metadata__":["pt"]}', '{"__metadata__":{"a":1}}', "\ufeff{}", '{"__metadata__":{"a":"b","a":"c"}', "[]", "7"],
)
def test_what_is_refused_the_library_refuses_too(tmp_path: Path, header: str) -> None:
    path = tmp_path / "model.safetensors"
    put(path, header.encode(), b"")
    with pytest.raises(CheckpointError):
        SafetensorsFiles([path])
    assert agrees(path)


@pytest.mark.parametrize("header", ["{}", ' {"__metadata__":null}', '{"__metadata__":{"a":"b"}}  '])
def test_what_is_accepted_the_library_accepts_too(tmp_path: Path, header: str) -> None:
    path = tmp_path / "model.safetensors"
    put(path, header.encode(), b"")
    assert SafetensorsFiles([path]).tensors == {} and not agrees(path)


def test_a_file_cut_short_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    files = SafetensorsFiles([path])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="became shorter"):
        files.read("a")


def test_the_same_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.ones(3)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="a is in both one and two"):
        SafetensorsFiles([tmp_path / "one", tmp_path / "two"])
