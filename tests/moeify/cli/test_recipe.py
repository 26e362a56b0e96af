from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.moeify import tiny
from tests.moeify.command import moeify_command

run = partial(moeify_command, "convert")


def plan(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return tiny.save(tiny.build("llama"), tmp_path / "src")


@pytest.fixture
def recipe(src: Path) -> Path:
    file = src.parent / "recipe.yaml"
    lines = [f"src: {src}", f"dst: {src.parent / 'moe'}", "experts: 4", "top-k: 2", "router: sigmoid", "dtype: bf16",
             "layers: 0,2", "no-verify: true", "seed:", "set:", "  z_loss: 1e-3", "  router.bias_rate: 0.01",
             "  capacity_factor: null", "  attach_losses: false", ""]  # fmt: skip
    file.write_text("\n".join(lines))
    return file


def test_a_recipe_says_what_options_say(src: Path, recipe: Path) -> None:
    sets = ("z_loss=1e-3", "router.bias_rate=0.01", "capacity_factor=none", "attach_losses=false")
    typed = ("--experts", 4, "--top-k", 2, "--router", "sigmoid", "--layers", "0,2", "--seed", 0,
             *(word for text in sets for word in ("--set", text)))  # fmt: skip
    assert plan("--config", recipe) == plan(src, *typed)
    done = run("--config", recipe)
    assert done.exit_code == 0, done.output
    record = json.loads((src.parent / "moe/moeify.json").read_text())
    assert record["cast_to"] == "BF16" and record["verification"] is None
    assert f"moeify convert --config {recipe}" in (src.parent / "moe/README.md").read_text()


def test_what_is_typed_wins(src: Path, recipe: Path) -> None:
    other = tiny.save(tiny.build("qwen2"), src.parent / "other")
    found = plan("--config", recipe, other, "--experts", 6, "--layers", "1", "--set", "z_loss=2", "--set", "jitter=.1")
    config = found["config"]
    assert found["model_type"] == "qwen2" and len(found["sites"]) == 1
    assert (config["experts"], config["top_k"], config["z_loss"], config["jitter"]) == (6, 2, 2, 0.1)
    assert config["attach_losses"] is False and config["router"]["bias_rate"] == 0.01


def test_a_recipe_is_written_back(src: Path, recipe: Path) -> None:
    shown = run("--config", recipe, "--experts", 6, "--set", "balance=cv2", "--dry-run", "--yaml")
    assert shown.exit_code == 0, shown.output
    again = yaml.safe_load(shown.stdout)
    assert again == {
        "src": str(src), "dst": str(src.parent / "moe"), "experts": 6, "top-k": 2, "router": "sigmoid",
        "set": {"z_loss": 0.001, "router.bias_rate": 0.01, "capacity_factor": None, "attach_losses": False,
                "balance": "cv2"},
        "layers": "0,2", "dtype": "bfloat16", "no-verify": True,
    }  # fmt: skip
    second = recipe.with_name("second.yaml")
    second.write_text(shown.stdout)
    assert plan("--config", second) == plan("--config", recipe, "--experts", 6, "--set", "balance=cv2")
    assert run("--config", second, "--dry-run", "--yaml").stdout == shown.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("expert: 4", "there is no field expert: did you mean experts?"),
        ("top_k: 2", "there is no field top_k: did you mean top-k?"),
        ("zzz: 2", "there is no field zzz: there are src, dst, experts"),
        ("config: other.yaml", "there is no field config"),
        ("experts: [4]", "experts is a list: expected one value"),
        ("set: z_loss=1", "set is a text: expected a mapping"),
        ("set: {router: {bias_rate: 1}}", "set.router is a mapping: expected one value"),
        ("set: {zloss: 1}", "there is no field zloss"),
        ("experts: 4.5", "'4.5' is not a valid integer"),
        ("overwrite: perhaps", "'perhaps' is not a valid boolean"),
        ("experts: 4\nexperts: 5", "a key is there twice"),
        ("- experts", "is no recipe: expected lines such as `experts: 8`"),
        ("experts: [", "is not YAML (line 1"),
        ("", "is no recipe"),
    ],
)
def test_a_wrong_recipe_is_wrong_usage(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    done = run("src", "dst", "--config", file, "--top-k", 2, *(() if "experts" in text else ("--experts", 4)))
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
