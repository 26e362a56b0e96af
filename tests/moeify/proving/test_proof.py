from __future__ import annotations

from pathlib import Path

import pytest

from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.dense import DenseCheckpoint
from moeify.hub.loading import Slice, load_slice
from moeify.proving import proof
from tests.moeify import tiny

CONFIG = MoEConfig(experts=3, top_k=2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "bert"])
def test_a_slice_holds_the_first_layers_and_what_is_around_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = tiny.save(tiny.build(name), tmp_path / "src")
    plan = tiny.convert_files(src, tmp_path / "moe", CONFIG)
    kept: list[Slice | None] = []

    def spy(source: object, cut: Slice | None, **kwargs: object) -> object:
        kept.append(cut)
        return load_slice(source, cut, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(proof, "load_slice", spy)
    with open_source(src) as source:
        assert proof.verify_slice(DenseCheckpoint(source), tmp_path / "moe", plan).passed
    assert [cut.layers for cut in kept if cut] == [2, 2]


def test_a_model_of_two_stacks_is_compared_whole(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("t5"), tmp_path / "src")
    plan = tiny.convert_files(src, tmp_path / "moe", CONFIG)
    with open_source(src) as source:
        assert proof.first_layers(DenseCheckpoint(source), plan) is None


def test_other_numbered_lists_are_not_cut() -> None:
    cut = Slice("encoder.layers.", 2)
    assert cut.keeps("encoder.layers.1.mlp.weight") and not cut.keeps("encoder.layers.2.mlp.weight")
    assert cut.keeps("features.conv_layers.6.weight") and cut.keeps("encoder.norm.weight")


def test_a_difference_in_a_late_layer_is_seen_by_the_whole_proof(tmp_path: Path) -> None:
    model = tiny.build("llama")
    src = tiny.save(model, tmp_path / "src")
    tiny.convert_files(src, tmp_path / "moe", CONFIG)
    assert proof.verify_checkpoints(src, tmp_path / "moe").passed
    model.get_parameter("model.layers.2.mlp.down_proj.weight").data.mul_(1.01)
    other = tiny.save(model, tmp_path / "other")
    assert not proof.verify_checkpoints(other, tmp_path / "moe").passed
