"""What is announced is what is written, to the byte, and what a saved plan is held to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import moeify.conversion.checkpoint as applier
from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import Callbacks, check_plan, plan_checkpoint
from moeify.conversion.dense import Dense, DenseCheckpoint
from moeify.errors import CheckpointError, ConfigError, RefusedError
from moeify.plan import Plan
from tests.moeify import tiny

CONFIG = MoEConfig(experts=3, top_k=2)


class Stopped(KeyboardInterrupt):
    """Stands for a signal."""


def test_a_disk_that_is_too_small_is_known_from_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listed(*_: object) -> None:
        raise AssertionError("tensors were listed before the space was looked at")

    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    monkeypatch.setattr(applier, "output_tensors", listed)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(CheckpointError, match="not enough space on the disk"):
        tiny.convert_files(src, tmp_path / "some/moe", MoEConfig(500, 2))
    assert list(tmp_path.iterdir()) == [src]


@pytest.mark.parametrize("shard_size", [10**9, 60_000, 1])
@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_the_progress_ends_at_the_total_and_the_total_is_what_lies_on_the_disk(
    shard_size: int, dtype: str | None, tmp_path: Path
) -> None:
    totals: list[int] = []
    written: list[int] = []
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    callbacks = Callbacks(total=totals.append, written=written.append)
    tiny.convert_files(src, tmp_path / "moe", CONFIG, shard_size=shard_size, dtype=dtype, callbacks=callbacks)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "moe").glob("*.safetensors"))
    assert totals == [on_disk] and sum(written) == on_disk


def test_a_resumed_conversion_ends_at_the_same_total(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    totals: list[int] = []
    written: list[int] = []

    def stop(nbytes: int) -> None:
        written.append(nbytes)
        if sum(written) > 200_000:
            raise Stopped

    with pytest.raises(Stopped):
        tiny.convert_files(src, tmp_path / "moe", CONFIG, shard_size=60_000, callbacks=Callbacks(written=stop))
    written.clear()
    callbacks = Callbacks(total=totals.append, written=written.append)
    tiny.convert_files(src, tmp_path / "moe", CONFIG, shard_size=60_000, resume=True, callbacks=callbacks)
    assert [sum(written)] == totals


@pytest.mark.parametrize(("target", "times"), [("mixtral", 0), ("moeify", 1)])
def test_a_plan_in_moeify_format_is_rehearsed_and_a_native_one_is_not(
    target: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsed: list[Plan] = []

    def rehearse(dense: Dense, plan: Plan) -> None:
        rehearsed.append(plan)

    monkeypatch.setattr(applier, "rehearse", rehearse)
    with open_source(tiny.save(tiny.build("llama"), tmp_path)) as source:
        dense = DenseCheckpoint(source)
        plan = plan_checkpoint(dense, CONFIG, target=target)
        assert rehearsed == [plan] * times
        check_plan(dense, plan)
    assert rehearsed == [plan] * 2 * times


def edited(plan: Plan, **changes: object) -> Plan:
    """The plan with another second site."""
    first, second, *others = plan.sites
    return replace(plan, sites=(first, replace(second, **changes), *others))  # type: ignore[arg-type]


def test_a_saved_plan_is_held_to_the_checkpoint(tmp_path: Path) -> None:
    with open_source(tiny.save(tiny.build("llama"), tmp_path)) as source:
        dense = DenseCheckpoint(source)
        plan = plan_checkpoint(dense, CONFIG)
        for good in (plan, replace(plan, sites=plan.sites[1:2], target="moeify"), Plan.from_json(plan.to_json())):
            check_plan(dense, good)
        for wrong, words in (
            (replace(plan, model_type="qwen3"), "the plan is for qwen3, the checkpoint is llama"),
            (edited(plan, path="model.layers.1.ffn"), "model.layers.1.ffn, and this model has no FFN there"),
            (edited(plan, intermediate=3), "model.layers.1.mlp, and this model has another FFN there"),
            (edited(plan, ups=plan.sites[0].ups), "model.layers.1.mlp, and this model has another FFN there"),
            (replace(plan, sites=()), "the plan converts nothing"),
            (replace(plan, sites=(*plan.sites, plan.sites[0])), "the plan converts model.layers.0.mlp twice"),
            (replace(plan, target="phimoe"), "expected auto, moeify, "),
        ):
            with pytest.raises(ConfigError, match=words):
                check_plan(dense, wrong)
        for refused, words in (
            (replace(plan, target="qwen3_moe"), "qwen3_moe can be made from qwen3"),
            (replace(plan, sites=plan.sites[1:2]), "2 of its layers stay dense"),
            (replace(plan, config=MoEConfig(4, 2, granularity=2)), "does not divide into 2 shards"),
        ):
            with pytest.raises(RefusedError, match=words):
                check_plan(dense, refused)


def test_the_record_beside_the_output_is_a_plan_with_its_proof(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    seen: list[Path] = []

    def check(folder: Path) -> object:
        seen.append(folder)
        assert (folder / "config.json").is_file() and not (tmp_path / "moe").exists()
        return {"passed": True}

    plan = tiny.convert_files(src, tmp_path / "moe", CONFIG, dtype="BF16", callbacks=Callbacks(check=check))
    record = json.loads((tmp_path / "moe/moeify.json").read_text())
    assert Plan.from_dict(record) == plan and record["moeify"] == 2 and len(seen) == 1
    assert record["verification"] == {"passed": True} and record["cast_to"] == "BF16"
    assert record["config"]["router"] == {"name": "softmax"} and record["config"]["method"] == {"name": "copy"}
