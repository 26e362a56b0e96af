from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from moeify.checkpoint.folder import PICKLE, SAFETENSORS, check_index, find_shards, note_file, side_files
from moeify.errors import CheckpointError


def write_index(folder: Path, weight_map: Any, weights: str = SAFETENSORS) -> Path:
    """An index, and two shards that nobody reads here."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("one", "two"):
        (folder / name).write_text(name)
    (folder / f"{weights}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("weights", [SAFETENSORS, PICKLE])
def test_shards_hold_what_the_index_says(tmp_path: Path, weights: str) -> None:
    folder = write_index(tmp_path, {"a": "one", "b": "two", "c": "one"}, weights)
    assert find_shards(folder, weights) == {folder / "one": {"a", "c"}, folder / "two": {"b"}}
    assert find_shards(folder, PICKLE if weights == SAFETENSORS else SAFETENSORS) is None


def test_an_index_too_large_to_be_one_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors.index.json").open("wb") as file:
        file.truncate(3 * 10**9)  # sparse
    with pytest.raises(CheckpointError, match="holds 3,000,000,000 bytes, expected at most 128,000,000"):
        find_shards(tmp_path, SAFETENSORS)


def test_the_whole_file_wins_over_the_index(tmp_path: Path) -> None:
    folder = write_index(tmp_path, {"a": "one"})
    (folder / SAFETENSORS).write_text("whole")
    assert find_shards(folder, SAFETENSORS) == {folder / SAFETENSORS: set()}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "three"}, "names the shard three, which does not exist"),
        ({"a": "../m/one"}, "leads outside the folder"),
        ({"a": "/etc/passwd"}, "leads outside the folder"),
        ({"a": "link"}, "leads outside the folder"),
        (["a"], "has no weight_map"),
        ({"a": 1}, "has no weight_map"),
        ({"a": "sub/one"}, "leads outside the folder"),
        ({"a": "."}, "leads outside the folder"),
        ({"a": ""}, "leads outside the folder"),
        ({"a": "one\0"}, "is no name of a file"),
        ({"a": "é" * 128}, "is no name of a file"),
        ({"a": "\ud800"}, "surrogates not allowed"),
        ({"a": "pipe"}, "names the shard pipe, which does not exist"),
        ({"a": "loop"}, "Too many levels of symbolic links"),
    ],
)
def test_an_index_that_is_not_followed(tmp_path: Path, weight_map: Any, message: str) -> None:
    folder = write_index(tmp_path / "m", weight_map)
    (tmp_path / "outside").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    with pytest.raises(CheckpointError, match=message):
        find_shards(folder, SAFETENSORS)


def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = write_index(tmp_path / "models--o--n" / "snapshots" / "rev", {"a": "one"})
    blobs = tmp_path / "models--o--n" / "blobs"
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("..", "..", "blobs", path.name))
    (snapshot / "LICENSE").symlink_to(Path("..", "..", "blobs", "two"))
    other = tmp_path / "other"
    other.symlink_to(snapshot)
    for folder in (snapshot, other):
        assert find_shards(folder, SAFETENSORS) == {folder / "one": {"a"}}
        assert side_files(folder) == (folder / "LICENSE",)


@pytest.mark.parametrize("blobs", ["blobs", "elsewhere"])
def test_a_side_file_that_is_a_link_out_of_the_folder(tmp_path: Path, blobs: str) -> None:
    folder = tmp_path / "m"
    for made in (folder, tmp_path / blobs):
        made.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").symlink_to("tokenizer.json")
    assert len(side_files(folder)) == 2
    (tmp_path / blobs / "vocab").write_text("{}")
    (folder / "vocab.txt").symlink_to(tmp_path / blobs / "vocab")
    with pytest.raises(CheckpointError, match=r"vocab\.txt is a link that leads outside the folder"):
        side_files(folder)


def test_a_generation_config_that_no_model_would_load_with(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json holds a JSON list"):
        side_files(tmp_path)


@pytest.mark.parametrize(
    ("file_of", "message"),
    [
        ({"a": "one"}, "two holds b, but it does not"),
        ({"a": "two", "b": "one"}, "one holds a, but it does not"),
        ({"a": "one", "b": "two", "extra": "two"}, None),
    ],
)
def test_every_tensor_is_where_the_index_says(tmp_path: Path, file_of: dict[str, str], message: str | None) -> None:
    shards = {tmp_path / "one": {"a"}, tmp_path / "two": {"b"}}
    found = {name: tmp_path / file for name, file in file_of.items()}
    if message is None:
        check_index(shards, found)
        return
    with pytest.raises(CheckpointError, match=message):
        check_index(shards, found)


def test_a_tensor_in_two_files() -> None:
    file_of: dict[str, Path] = {}
    for _ in range(2):
        note_file(file_of, "a", Path("m/one"))
    with pytest.raises(CheckpointError, match="a is in both one and two"):
        note_file(file_of, "a", Path("m/two"))


def test_side_files_are_those_that_belong_to_a_model(tmp_path: Path) -> None:
    taken = ["LICENSE", "chat_template.jinja", "generation_config.json", "merges.txt", "preprocessor_config.json"]
    taken += ["special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    left = [".hidden", "README.md", "modeling_x.py", "tokenizer_x.py", "optimizer.pt", "trainer_state.json"]
    left += ["tokenizer.index.json", "config.json", "model.safetensors"]
    for name in (*taken, *left):
        (tmp_path / name).write_text("{}")
    (tmp_path / "tokenizer").mkdir()
    os.mkfifo(tmp_path / "tokenizer.pipe")
    assert [path.name for path in side_files(tmp_path)] == sorted(taken)
