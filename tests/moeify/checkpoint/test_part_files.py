"""Folders as the ranks of transformers' distributed runs write them; real ones are read in test_distribution.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moeify
from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.errors import CheckpointError
from tests.moeify import tiny
from tests.moeify.command import moeify_command
from tests.moeify.parts import FILE, Part, write_parts


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model in three files: matrices in 2x2 blocks over the first ones and columns, the rest in the third."""
    model: Any = tiny.build("llama")
    folder = tmp_path / "saved"
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    parts: list[Part] = [{}, {}, {}]
    for name, value in model.state_dict().items():
        if value.dim() < 2:
            parts[2][name] = value, [0]
            continue
        rows, columns = len(value) // 3, value.shape[1] // 2
        parts[0][name] = value[:rows], [0, 0]
        parts[1][name] = value[rows:, :columns], [rows, 0]
        parts[2][name] = value[rows:, columns:], [rows, columns]
    write_parts(folder, parts)
    return folder


def test_parts_are_put_together(saved: Path, tmp_path: Path) -> None:
    wanted = tiny.build("llama").state_dict()
    loaded = moeify.load(saved)
    assert all(value.equal(wanted[name]) for name, value in loaded.state_dict().items())
    with open_source(saved) as source:
        assert all(source.read(name).equal(value) for name, value in wanted.items())
    tiny.convert_files(saved, tmp_path / "moe", MoEConfig(4, 2), target="moeify")
    whole = tiny.save(tiny.build("llama"), tmp_path / "whole")
    tiny.convert_files(whole, tmp_path / "other", MoEConfig(4, 2), target="moeify")
    one, other = (moeify.load(tmp_path / name).state_dict() for name in ("moe", "other"))
    assert all(value.equal(other[name]) for name, value in one.items())
    proved = moeify_command("verify", saved, tmp_path / "moe")
    assert proved.exit_code == 0, proved.output


def _without_offsets(folder: Path) -> None:
    save_file({"x": torch.zeros(2)}, folder / FILE.format(2))


def _linked(folder: Path) -> None:
    moved = (folder / FILE.format(2)).rename(folder.parent / "elsewhere")
    (folder / FILE.format(2)).symlink_to(moved)


def _twice(folder: Path) -> None:
    (folder / FILE.format(4)).write_bytes((folder / FILE.format(2)).read_bytes())


def _of_another_dtype(folder: Path) -> None:
    write_parts(folder, [{"lm_head.weight": (torch.zeros(3, 36).half(), [0, 0])}])


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / FILE.format(2)).unlink(), "no shard-00002-model-00001-of-… beside the parts"),
        (lambda folder: (folder / FILE.format(3)).unlink(), r"of its .* elements in .*: a file of parts is missing"),
        (_without_offsets, "does not say where its part of x begins"),
        (_linked, "is a link that leads outside the folder: it is not opened"),
        (_twice, "hold the same elements of .*: they are of different runs"),
        (_of_another_dtype, r"lm_head.weight is F16\[3, 36\] in shard-00001.* they are of different runs"),
    ],
)
def test_what_does_not_fit_is_one_line(saved: Path, damage: Callable[[Path], object], match: str) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=match) as caught:
        moeify.load(saved)
    assert "\n" not in str(caught.value)


def test_a_missing_last_rank_is_seen_by_the_shapes(tmp_path: Path) -> None:
    """Nothing in the files says how many ranks there were."""
    model: Any = tiny.build("llama")
    model.config.save_pretrained(tmp_path)
    write_parts(tmp_path, [{name: (value[:20], [0] * value.dim()) for name, value in model.state_dict().items()}])
    with pytest.raises(CheckpointError, match=r"mismatched tensor .* \(\[20, 36\] instead of \[101, 36\]\)"):
        moeify.load(tmp_path)
