from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moeify.checkpoint.source import open_source
from moeify.errors import CheckpointError


class Bomb:
    """Deletes a file when it is unpickled without a guard."""

    def __init__(self, victim: str) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.unlink, (self.victim,))


def write(folder: Path, state: Any, name: str = "pytorch_model.bin", **how: Any) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    torch.save(state, folder / name, **how)


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_tensors_contiguous_and_on_their_own(tmp_path: Path, zipped: bool) -> None:
    strided = torch.arange(12.0).reshape(3, 4).T
    write(tmp_path, {"t": strided, "u": strided}, _use_new_zipfile_serialization=zipped)
    with open_source(tmp_path, allow_pickle=True) as source:
        read = source.read("t")
        assert read.is_contiguous()
        assert torch.equal(read, strided)
        read.zero_()
        assert torch.equal(source.read("u"), strided)
        assert source.span("t") is None
        assert source.tensors["t"].shape == (4, 3)


def test_is_refused_without_the_flag(tmp_path: Path) -> None:
    write(tmp_path, {"t": torch.ones(2)})
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_source(tmp_path)


def test_an_index_of_pickles_is_checked_too(tmp_path: Path) -> None:
    write(tmp_path, {"t": torch.ones(2)}, name="one.bin")
    index = {"weight_map": {"t": "one.bin", "gone": "one.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="holds gone, but it does not"):
        open_source(tmp_path, allow_pickle=True)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("here")
    write(tmp_path, {"t": Bomb(str(victim))})
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        open_source(tmp_path, allow_pickle=True)
    assert victim.exists()


@pytest.mark.parametrize("content", [[1, 2], {"t": 3}, {"t": torch.ones(2).to_sparse()}])
def test_what_is_not_a_state_dict(tmp_path: Path, content: Any) -> None:
    write(tmp_path, content)
    with pytest.raises(CheckpointError, match="not a"):
        open_source(tmp_path, allow_pickle=True)


def test_the_file_is_mapped_while_it_is_open_and_no_longer(tmp_path: Path) -> None:
    write(tmp_path, {"t": torch.ones(2)})
    file, maps = str(tmp_path / "pytorch_model.bin"), Path("/proc/self/maps")
    with open_source(tmp_path, allow_pickle=True) as source:
        assert file in maps.read_text()
    assert file not in maps.read_text()
    assert source.tensors["t"].shape == (2,)


def test_a_truncated_pickle(tmp_path: Path) -> None:
    write(tmp_path, {"t": torch.ones(1000)})
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_source(tmp_path, allow_pickle=True)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({1: torch.ones(2)}, "has the key 1, not the name of a tensor"),
        ({"t": torch.ones(2, device="meta")}, "holds t, which is not a plain tensor"),
        ({"t": torch.ones(1).expand(10**12)}, r"holds t with repeated values \(4,000,000,000,000 bytes\)"),
    ],
)
def test_tensors_that_the_file_does_not_hold(tmp_path: Path, state: Any, message: str) -> None:
    write(tmp_path, state)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path, allow_pickle=True)


def test_a_dimension_of_one_may_be_expanded(tmp_path: Path) -> None:
    write(tmp_path, {"position_ids": torch.arange(5).expand(1, -1)})
    with open_source(tmp_path, allow_pickle=True) as source:
        assert source.read("position_ids").shape == (1, 5)


def test_a_pickle_that_is_cut_after_it_was_opened_is_not_touched(tmp_path: Path) -> None:
    write(tmp_path, {"t": torch.ones(10_000)})
    with open_source(tmp_path, allow_pickle=True) as source:
        (tmp_path / "pytorch_model.bin").write_bytes(b"")  # reading what was mapped would end the process
        with pytest.raises(CheckpointError, match="changed while it was read"):
            source.read("t")


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04", b"\x80\x02}q\x00K\x01", b"\x80\x02]\x94" + b"]" * 99_999 + b"."])
def test_what_torch_does_not_load_is_one_line(tmp_path: Path, raw: bytes) -> None:
    write(tmp_path, {})
    (tmp_path / "pytorch_model.bin").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"cannot be read as plain tensors|holds a") as caught:
        open_source(tmp_path, allow_pickle=True)
    assert "\n" not in str(caught.value)
