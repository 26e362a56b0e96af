"""A conversion learns each thing of a dense model once, whatever it does with the model."""

from __future__ import annotations

import json
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import moeify
from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.dense import Dense, DenseCheckpoint
from moeify.errors import CheckpointError, ConfigError, MoeifyError
from moeify.passes.find_ffn import find_ffns_in
from moeify.tracing.skeleton import build_on_meta, config_of, model_class, stored_names
from moeify.tracing.trace import trace
from tests.moeify import tiny
from tests.moeify.command import moeify_command

COUNTED = (build_on_meta, stored_names, trace, find_ffns_in, model_class)
SETTINGS = ("--experts", "3", "--top-k", "2")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of the slow functions is called, by whatever name a module knows it."""
    counts: Counter[str] = Counter()

    def counted(function: Any) -> Any:
        def spy(*args: Any, **kwargs: Any) -> Any:
            counts[function.__name__] += 1
            return function(*args, **kwargs)

        return spy

    for name in ("conversion.checkpoint", "conversion.cost", "conversion.summary", "proving.proof"):
        import_module(f"moeify.{name}")  # all modules that could call them

    for function in COUNTED:
        spy = counted(function)
        for name, module in list(sys.modules.items()):
            if name.startswith("moeify") and getattr(module, function.__name__, None) is function:
                monkeypatch.setattr(module, function.__name__, spy)
    return counts


def run(*arguments: object) -> str:
    result = moeify_command(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


ONCE = {"build_on_meta": 1, "stored_names": 1, "trace": 1, "find_ffns_in": 1}


@pytest.mark.parametrize("target", ["mixtral", "moeify"])
def test_a_proven_conversion_learns_everything_once(target: str, calls: Counter[str], tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    run("convert", src, tmp_path / "moe", *SETTINGS, "--to", target)
    assert calls.pop("model_class") <= 8  # twice each: the skeleton, the output without values, the two of the proof
    assert calls == ONCE


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_dry_run_learns_everything_once(form: tuple[str, ...], calls: Counter[str], tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    run("convert", src, *SETTINGS, "--dry-run", *form)
    assert calls.pop("model_class") <= 2
    assert calls == ONCE


def test_a_saved_plan_is_compared_without_planning_again(calls: Counter[str], tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    (tmp_path / "plan.json").write_text(run("convert", src, *SETTINGS, "--dry-run", "--json"))
    calls.clear()
    run("convert", src, tmp_path / "moe", "--plan", tmp_path / "plan.json", "--no-verify")
    assert calls.pop("model_class") <= 4  # the skeleton, and the output without values
    assert calls == ONCE


def test_inspect_learns_everything_once(calls: Counter[str], tmp_path: Path) -> None:
    src = tiny.save(tiny.build("bert"), tmp_path / "src")
    run("inspect", src)
    assert calls.pop("model_class") <= 2
    assert calls == ONCE


def test_a_live_conversion_traces_and_searches_once(calls: Counter[str]) -> None:
    moeify.convert(tiny.build("llama"), MoEConfig(3, 2))
    assert calls == {"trace": 1, "find_ffns_in": 1}


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_full_config_is_that_of_the_class(name: str, tmp_path: Path) -> None:
    with open_source(tiny.save(tiny.build(name), tmp_path)) as source:
        assert DenseCheckpoint(source).config == config_of(source.config).to_dict()


def test_what_is_learned_of_a_checkpoint(tmp_path: Path) -> None:
    with open_source(tiny.save(tiny.build("phi3"), tmp_path)) as source:
        dense = DenseCheckpoint(source)
        assert all(parameter.is_meta for parameter in dense.model.parameters())
        assert dense.names.of["model.embed_tokens.weight"] == "model.embed_tokens.weight"
        assert dense.source.nbytes == sum(4 * parameter.numel() for parameter in dense.model.parameters())
        assert [ffn.name for ffn in dense.inspection.ffns] == [f"model.layers.{i}.mlp" for i in range(tiny.LAYERS)]
        assert dense.regions.keys() == {ffn.projected for ffn in dense.inspection.ffns}
        assert dense.graph_module.meta["untraced"] == {}
        assert dense.info("model.norm.weight").shape == (tiny.HIDDEN,)
        with pytest.raises(CheckpointError, match=r"has no tensor transformer\.wte\.weight among its"):
            dense.info("transformer.wte.weight")


def test_nothing_is_learned_before_it_is_asked_for() -> None:
    dense = Dense(torch.nn.Linear(3, 3), {"nonsense": torch.zeros(1)})
    with pytest.raises(MoeifyError):
        _ = dense.graph_module


def test_ffns_are_found_in_a_model_that_stays_as_it_is() -> None:
    model = tiny.build("gpt2")
    before = repr(model)
    found = moeify.find_ffns(model)
    assert len(found.ffns) == tiny.LAYERS and repr(model) == before


def test_what_cannot_be_converted_is_refused_before_it_is_traced(calls: Counter[str], tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**config, "intermediate_size": 2**23}))
    with open_source(src) as source, pytest.raises(CheckpointError, match=r"has shape .* expects \[36, 8388608"):
        DenseCheckpoint(source)
    (src / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    with open_source(src) as source, pytest.raises(CheckpointError, match="holds no tensor of a BertModel: its config"):
        DenseCheckpoint(source)
    (src / "config.json").write_text(json.dumps(config))
    (src / "LICENSE").symlink_to("/etc/hostname")
    with open_source(src) as source, pytest.raises(CheckpointError, match="leads outside the folder"):
        DenseCheckpoint(source)
    (src / "LICENSE").unlink()
    with open_source(src) as source, pytest.raises(ConfigError, match="input_ids hold 999"):
        DenseCheckpoint(source, {"input_ids": torch.tensor([[999]])})
    assert "trace" not in calls
