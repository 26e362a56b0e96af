from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moeify.config import MoEConfig
from moeify.errors import CheckpointError
from moeify.plan import VERSION, Plan
from moeify.proving.record import Promise, read_promise

CONFIG = MoEConfig(3, 2).to_dict()
RECORD = {"moeify": VERSION, "config": CONFIG, "cast_to": None}


def promise(folder: Path, **changes: Any) -> Promise:
    (folder / "moeify.json").write_text(json.dumps({**RECORD, **changes}))
    return read_promise(folder)


def test_the_method_says_whether_the_model_is_exact(tmp_path: Path) -> None:
    assert promise(tmp_path) == Promise(exact=True, cast_to=None)
    assert promise(tmp_path, config=MoEConfig(3, 2, method="noise").to_dict(), cast_to="BF16") == Promise(False, "BF16")


def test_a_model_of_others_is_held_to_equality(tmp_path: Path) -> None:
    assert read_promise(tmp_path) == Promise(exact=True, cast_to=None)


def test_the_plan_is_read_where_there_is_one(tmp_path: Path) -> None:
    plan = Plan("llama", MoEConfig(3, 2), ())
    assert promise(tmp_path, **plan.to_dict()).plan == plan


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moeify": 99}, "version 99"),
        ({"moeify": None}, "version None"),
        ({"cast_to": "F99"}, "cast_to is 'F99'"),
        ({"cast_to": "I64"}, "cast_to is 'I64'"),
        ({"cast_to": ["BF16"]}, "unhashable"),
        ({"config": None}, "mapping"),
        ({"config": {}}, "missing"),
        ({"config": {"experts": "3", "top_k": 2}}, "experts is '3'"),
        ({"config": {**CONFIG, "method": {"name": 5}}}, "method is 5"),
        ({"config": {**CONFIG, "method": {"name": "copy", "x": 1}}}, "method.x"),
    ],
)
def test_a_damaged_record_is_one_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as raised:
        promise(tmp_path, **changes)
    assert "\n" not in str(raised.value) and "moeify.json cannot be used" in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 100_000, b'{"moeify": ' + b"9" * 5000 + b"}"]
)
def test_a_file_that_is_no_record_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "moeify.json").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        read_promise(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_folder_in_its_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "moeify.json").mkdir()
    with pytest.raises(CheckpointError, match="it is a folder, expected a regular file"):
        read_promise(tmp_path)
