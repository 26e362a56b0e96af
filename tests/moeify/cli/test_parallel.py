"""`--ep`: what expert parallelism would cost, for a dense model, a plan, and MoEs of both kinds."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from moeify.config import MoEConfig
from tests.moeify import native, tiny
from tests.moeify.command import moeify_command

asked = partial(moeify_command, env={"COLUMNS": "80"})


def test_a_dense_model_and_its_plan_cost_the_same(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    ranks = ("--ep", 4, "--dp", 2, "--tokens", 1000, "--bandwidth", 25)
    shown = [asked("inspect", src, *ranks), asked("convert", src, "--experts", 8, "--top-k", 2, "--dry-run", *ranks)]
    assert [result.exit_code for result in shown] == [0, 0], shown[1].output
    assert shown[0].stdout in shown[1].stdout and max(map(len, shown[0].stdout.splitlines())) <= 80
    words = " ".join(shown[0].stdout.split())
    assert "4 ranks share the experts, 8 ranks in all, 1,000 tokens on each" in words and "counting: " in words
    half = asked("convert", src, "--experts", 8, "--top-k", 2, "--dry-run", *ranks, "--dtype", "bf16").stdout
    assert "values of 2 bytes" in " ".join(half.split()) and "values of 4 bytes" in words


@pytest.mark.parametrize("name", ["mixtral", "converted"])
def test_json_holds_the_estimate(name: str, tmp_path: Path) -> None:
    if name == "mixtral":
        src = tiny.save(native.build(name), tmp_path / "moe")
    else:
        dense = tiny.save(tiny.build("gpt2"), tmp_path / "src")
        src = tmp_path / "moe"
        tiny.convert_files(dense, src, MoEConfig(6, 2, capacity_factor=1.5), target="moeify")
    result = asked("inspect", src, "--json", "--ep", 3, "--tokens", 600)
    assert result.exit_code == 0, result.output
    seen = json.loads(result.stdout)
    parallel = seen["parallel"]
    (layer,) = parallel["layers"]
    assert layer["layer"]["experts"] == 6 and layer["layer"]["count"] == 3
    assert layer["layer"]["capacity_factor"] == (1.5 if name == "converted" else None)
    assert [at["factor"] for at in layer["at"]] == [1.0, 1.25, 1.5, 2.0, None]
    row = 2 * 36 * 4 + 4  # a row and its weight, there or back, forward and backward
    assert layer["at"][-1]["exchanged"] == 2 * (5 + 2) * 8 + 2 * 600 * 2 * 2 // 3 * row
    assert parallel["setup"]["parameters"] == seen["cost"]["dense"]["parameters"]


@pytest.mark.parametrize(
    ("words", "code", "match"),
    [
        (["inspect", "--tokens", 5], 2, "--tokens goes with --ep"),
        (["inspect", "--ep", 2, "--flops", "nan"], 2, "--flops is nan: expected a number above 0"),
        (["inspect", "--ep", 3], 2, "8 experts cannot be shared evenly by 3 ranks: choose --ep 2 or 4 or 8"),
        (["convert", "--experts", 8, "--top-k", 2, "dst", "--ep", 2], 2, "--ep goes with --dry-run"),
        (["convert", "--experts", 8, "--top-k", 2, "--dry-run", "--json", "--ep", 2], 2, "without --json"),
    ],
)
def test_wrong_use_is_said(words: list[object], code: int, match: str, tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    result = asked(words[0], src, *words[1:])
    assert result.exit_code == code and match in " ".join(result.stderr.split()), result.output
