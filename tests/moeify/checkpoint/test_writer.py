from __future__ import annotations

import errno
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
from safetensors.torch import load_file, save_file

from moeify.checkpoint.shards import OutTensor, SourceRows
from moeify.checkpoint.source import Source, open_source
from moeify.checkpoint.writer import plan_files, write_index, write_shards
from moeify.errors import CheckpointError
from moeify.files.staging import staged_folder

E, INNER, HIDDEN = 3, 5, 7


def write_source(folder: Path, dtype: torch.dtype = torch.bfloat16, *, pickled: bool = False) -> Source:
    """An FFN of width 5 on 7, an embedding, and an integer buffer of odd size."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER), "embed": (11, HIDDEN)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["ids"] = torch.arange(3, dtype=torch.uint8)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return open_source(folder, allow_pickle=True)


def upcycled(source: Source) -> list[OutTensor]:
    """Copies, stacked copies, rows and computed tensors: every kind there is."""
    info = source.tensors
    dtype = info["gate"].dtype
    return [
        OutTensor.copy(info["ids"]),
        OutTensor.copy(info["embed"], "renamed"),
        OutTensor("gate_up", dtype, (E, 2 * INNER, HIDDEN), (SourceRows("gate"), SourceRows("up")) * E),
        *(OutTensor(f"experts.{e}.down", dtype, (HIDDEN, INNER), (SourceRows("down"),)) for e in range(E)),
        OutTensor("rows", dtype, (3, HIDDEN), (SourceRows("embed", (4, 6)), SourceRows("embed", (0, 1)))),
        OutTensor("router", "F32", (E, HIDDEN), (lambda: torch.linspace(-1, 1, E * HIDDEN).reshape(E, HIDDEN),)),
        OutTensor("turned", dtype, (E, HIDDEN, INNER), (lambda: source.read("gate").T,) * E),
        OutTensor("mixed", dtype, (2 * INNER, HIDDEN), (SourceRows("gate"), lambda: source.read("up") * 2)),
        OutTensor("scalar", "F64", (), (lambda: torch.tensor(0.5, dtype=torch.float64),)),
        OutTensor("empty", "F16", (0, 4), (lambda: torch.empty(0, 4, dtype=torch.float16),)),
    ]


def expected(source: Source) -> dict[str, torch.Tensor]:
    gate, up, down, embed = (source.read(name) for name in ("gate", "up", "down", "embed"))
    return {
        "ids": source.read("ids"),
        "renamed": embed,
        "gate_up": torch.stack([torch.cat([gate, up])] * E),
        **{f"experts.{e}.down": down for e in range(E)},
        "rows": torch.stack([embed[4], embed[5], embed[0]]),
        "router": torch.linspace(-1, 1, E * HIDDEN).reshape(E, HIDDEN),
        "turned": torch.stack([gate.T] * E),
        "mixed": torch.cat([gate, up * 2]),
        "scalar": torch.tensor(0.5, dtype=torch.float64),
        "empty": torch.empty(0, 4, dtype=torch.float16),
    }


def nothing(_: object) -> None:
    pass


def write(source: Source, folder: Path, tensors: list[OutTensor] | None = None, **changes: Any) -> None:
    folder.mkdir(exist_ok=True)
    how: dict[str, Any] = {"resume": False, "on_bytes": nothing, "on_nonfinite": nothing} | changes
    planned = how.pop("shard_size", 300), how.pop("plan_key", "")
    files = plan_files(source, upcycled(source) if tensors is None else tensors, *planned)
    write_shards(files, folder, **how)
    if len(files.shards) > 1:
        write_index(folder, files.shards)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("shard_size", [1, 300, 10**9])
def test_the_library_reads_what_was_planned(tmp_path: Path, shard_size: int, pickled: bool) -> None:
    source = write_source(tmp_path / "src", pickled=pickled)
    written: list[int] = []
    write(source, tmp_path / "out", shard_size=shard_size, on_bytes=written.append)
    loaded, wanted = load_all(tmp_path / "out"), expected(source)
    assert loaded.keys() == wanted.keys()
    for name, value in wanted.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value), name
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert sum(written) == sum(file.stat().st_size for file in files)
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    reread = open_source(tmp_path / "out")
    if len(files) > 1:
        total = json.loads(index.read_text())["metadata"]["total_size"]
        assert total == sum(info.nbytes for info in reread.tensors.values())
    for name, value in wanted.items():
        assert torch.equal(reread.read(name), value)


@given(
    st.lists(st.tuples(st.sampled_from(["gate", "up", "embed"]), st.integers(0, 5), st.integers(0, 5)), max_size=5),
    st.integers(1, 500),
)
@settings(max_examples=40, deadline=None)
def test_any_rows_of_any_tensors(rows: list[tuple[str, int, int]], shard_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = write_source(Path(folder) / "src")
        pieces = [(name, min(a, b), max(a, b)) for name, a, b in rows]
        height = sum(stop - start for _, start, stop in pieces)
        parts = tuple(SourceRows(name, (start, stop)) for name, start, stop in pieces)
        write(source, Path(folder) / "out", [OutTensor("t", "BF16", (height, HIDDEN), parts)], shard_size=shard_size)
        wanted = [source.read(name)[start:stop] for name, start, stop in pieces]
        loaded = load_all(Path(folder) / "out")["t"]
        assert torch.equal(loaded, torch.cat([torch.empty(0, HIDDEN, dtype=torch.bfloat16), *wanted]))


class Killed(BaseException):
    """The process ends here, as far as the writer can see."""


def kill_after(nbytes: int) -> Callable[[int], None]:
    left = nbytes

    def count(written: int) -> None:
        nonlocal left
        left -= written
        if left < 0:
            raise Killed

    return count


@pytest.mark.parametrize("pickled", [False, True])
def test_nonfinite_tensors_are_named_once_before_they_are_written(tmp_path: Path, pickled: bool) -> None:
    tensors = {"bad": torch.tensor([1.0, float("nan")]), "good": torch.ones(2), "unused": torch.tensor([float("inf")])}
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    plan = [
        OutTensor("one", "F32", (2,), (SourceRows("good"),)),
        OutTensor("two", "F32", (4,), (SourceRows("bad"),) * 2),
        OutTensor("three", "F16", (1,), (lambda: torch.tensor([1e9]).half(),)),
        OutTensor("four", "F32", (1,), (SourceRows("bad", (0, 1)),)),
    ]
    source = open_source(folder, allow_pickle=True)
    named: list[str] = []
    write(source, tmp_path / "out", plan, on_nonfinite=named.append, shard_size=8)
    assert named == ["bad", "three"]
    resumed: list[str] = []
    write(source, tmp_path / "out", plan, on_nonfinite=resumed.append, shard_size=8, resume=True)
    assert resumed == named

    def refuse(name: str) -> None:
        raise CheckpointError(name)

    with pytest.raises(CheckpointError, match="bad"):
        write(source, tmp_path / "strict", plan, on_nonfinite=refuse, shard_size=8)
    assert "model-00002-of-00003.safetensors" not in contents(tmp_path / "strict")


@pytest.mark.parametrize("kernel", ["copy_file_range", "write"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    source = write_source(tmp_path / "src")
    before = contents(tmp_path / "src")
    real: Callable[..., int] = getattr(os, kernel)
    calls = iter(range(4))

    def fill_up(*args: Any, **kwargs: Any) -> int:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, kernel, fill_up)
    with (
        pytest.raises(CheckpointError, match="the disk became full"),
        staged_folder(tmp_path / "out", overwrite=False, resume=False) as folder,
    ):
        write(source, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert contents(tmp_path / "src") == before


def test_the_record_of_an_interrupted_run_is_not_published(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src")
    with pytest.raises(Killed), staged_folder(tmp_path / "out", overwrite=False, resume=False) as folder:
        write(source, folder, on_bytes=kill_after(1500))
    with staged_folder(tmp_path / "out", overwrite=False, resume=True) as folder:
        assert list(folder.glob("*.safetensors"))
        write(source, folder, resume=True)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
    assert load_all(tmp_path / "out").keys() == expected(source).keys()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (OutTensor("t", "F32", (5, 7), (SourceRows("gate"),)), "t is F32, but its part gate is BF16"),
        (OutTensor("t", "BF16", (5, 8), (SourceRows("gate"),)), "t needs 80 bytes, its parts have 70"),
        (OutTensor("t", "BF16", (1, 7), (SourceRows("gate", (5, 6)),)), "has no rows 5 to 6"),
        (OutTensor("t", "F32", (3,), (lambda: torch.ones(2),)), "t needs 12 bytes, its parts have 8"),
        (OutTensor("t", "F32", (2,), (lambda: torch.ones(2).double(),)), "is torch.float64"),
    ],
)
def test_parts_that_do_not_make_up_the_tensor(tmp_path: Path, tensor: OutTensor, message: str) -> None:
    source = write_source(tmp_path / "src")
    with pytest.raises(ValueError, match=message):
        write(source, tmp_path / "out", [tensor])


def test_a_repeated_piece_is_computed_once(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src")
    calls: list[int] = []

    def build() -> torch.Tensor:
        calls.append(1)
        return torch.ones(2)

    write(source, tmp_path / "out", [OutTensor("t", "F32", (8, 2), (build,) * 8)])
    assert len(calls) == 1


def test_a_part_that_the_source_lacks(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src")
    with pytest.raises(CheckpointError, match="has no tensor missing among its 5"):
        write(source, tmp_path / "out", [OutTensor("t", "BF16", (1,), (SourceRows("missing"),))])
