"""An interrupted conversion goes on where it stopped, and trusts nothing that it finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moeify.checkpoint.shards import OutTensor, SourceRows
from moeify.checkpoint.source import Source
from tests.moeify.checkpoint.test_writer import HIDDEN, Killed, contents, kill_after, upcycled, write, write_source


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_resumed_output_is_the_same_bytes(tmp_path: Path, share: float) -> None:
    source = write_source(tmp_path / "src")
    write(source, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    size = sum(len(data) for name, data in whole.items() if name.endswith(".safetensors"))
    with pytest.raises(Killed):
        write(source, tmp_path / "out", on_bytes=kill_after(int(share * size)))
    kept = {path: path.stat().st_ino for path in (tmp_path / "out").glob("*.safetensors")}
    written: list[int] = []
    write(source, tmp_path / "out", resume=True, on_bytes=written.append)
    assert contents(tmp_path / "out") == whole
    assert sum(written) == size
    assert all(path.stat().st_ino == inode for path, inode in kept.items())
    assert share < 0.5 or kept


@pytest.mark.parametrize("damage", ["header", "copied", "computed", "last byte", "shorter", "longer", "link"])
def test_a_resumed_shard_is_trusted_by_what_it_holds(tmp_path: Path, damage: str) -> None:
    source = write_source(tmp_path / "src")
    write(source, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    write(source, tmp_path / "out")
    name = next(name for name, data in whole.items() if b"router" in data and name.endswith(".safetensors"))
    other = next(name for name, data in whole.items() if b"renamed" in data and name.endswith(".safetensors"))
    assert name != other
    path = tmp_path / "out" / (other if damage == "copied" else name)
    data, inode = bytearray(path.read_bytes()), path.stat().st_ino
    at = {"header": 9, "copied": -40, "computed": data.find(torch.tensor(-1.0).numpy().tobytes())}.get(damage, -1)
    data[at] ^= 1
    if damage == "shorter":
        del data[-1]
    if damage == "longer":
        data = bytearray(whole[path.name]) + b" "
    path.write_bytes(data)
    if damage == "link":
        path.write_bytes(whole[path.name])
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    written: list[int] = []
    write(source, tmp_path / "out", resume=True, on_bytes=written.append)
    assert contents(tmp_path / "out") == whole and not path.is_symlink()
    assert damage != "link" or (tmp_path / "elsewhere").stat().st_ino == inode
    assert sum(written) == sum(len(data) for name, data in whole.items() if name.endswith(".safetensors"))


def test_what_another_plan_left_is_not_published(tmp_path: Path) -> None:
    source = write_source(tmp_path / "src")
    for name in (".model-00009-of-00009.safetensors.partial", "tokenizer.json", "model.safetensors.index.json"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("old")
    (tmp_path / "out" / "templates").mkdir()
    write(source, tmp_path / "out", resume=True, shard_size=10**9)
    assert sorted(contents(tmp_path / "out")) == [".moeify-resume", "model.safetensors"]


def seeded(source: Source, seed: int, start: int) -> list[OutTensor]:
    """In the first files: a computed tensor that depends on a seed, and rows of the source."""
    return [
        OutTensor("drawn", "F32", (75,), (lambda: torch.full((75,), float(seed)),)),
        OutTensor("cut", source.tensors["embed"].dtype, (2, HIDDEN), (SourceRows("embed", (start, start + 2)),)),
        *upcycled(source),
    ]


@pytest.mark.parametrize("change", ["order", "key", "rows", "source"])
def test_resume_of_another_plan_starts_anew(tmp_path: Path, change: str) -> None:
    source = write_source(tmp_path / "src")
    with pytest.raises(Killed):
        write(source, tmp_path / "out", seeded(source, 0, 4), plan_key="seed 0", on_bytes=kill_after(1500))
    stale = contents(tmp_path / "out")
    if change == "source":
        source = write_source(tmp_path / "src", torch.float16)
    seed, start = int(change == "key"), 5 if change == "rows" else 4
    tensors = seeded(source, seed, start)[:: -1 if change == "order" else 1]
    write(source, tmp_path / "out", tensors, resume=True, plan_key=f"seed {seed}")
    write(source, tmp_path / "fresh", tensors, plan_key=f"seed {seed}")
    fresh = contents(tmp_path / "fresh")
    assert any(data != fresh[name] for name, data in stale.items() if name.endswith(".safetensors"))
    assert contents(tmp_path / "out") == fresh
