from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moeify
from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.dense import DenseCheckpoint
from moeify.errors import VerificationError
from moeify.hub.loading import FirstLayers, load_first_layers
from moeify.proving import proof
from tests.moeify import tiny

CONFIG = MoEConfig(experts=3, top_k=2)


class Constant(nn.Module):
    """Answers with what it holds."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> torch.Tensor:
        return self.value


def test_the_figures_are_those_of_the_definition() -> None:
    before = torch.tensor([[1.0, -4.0, 2.0], [0.0, 3.0, 1.0]])
    after = before + torch.tensor([[0.0, 0.0, 0.5], [0.0, -2.5, 0.0]])
    report = moeify.verify(Constant(before), Constant(after), {})
    assert (report.max_abs_diff, report.max_abs_logit, report.relative) == (2.5, 4.0, 0.625)
    assert report.top1_agreement == 0.5
    assert not report.passed and report.tolerance == 1e-5


@pytest.mark.parametrize(("off", "passed"), [(0.9e-5, True), (1.1e-5, False)])
def test_the_tolerance_is_a_limit(off: float, passed: bool) -> None:
    before = torch.tensor([[1.0, 0.5]])
    report = moeify.verify(Constant(before), Constant(before - torch.tensor([[0.0, off]])), {})
    assert report.passed is passed


def test_a_method_that_promises_nothing_is_measured_and_passes() -> None:
    before = torch.ones(2, 3)
    report = moeify.verify(Constant(before), Constant(2 * before), {}, exact=False)
    assert report.passed and report.tolerance is None and report.relative == 1


def test_nan_passes_only_where_the_dense_model_gives_it_too() -> None:
    nan, half = torch.full((1, 2), torch.nan), torch.tensor([[torch.nan, 1.0]])
    for dense, moe in ((torch.ones(1, 2), nan), (half, nan), (nan, half), (torch.ones(1, 2), half)):
        assert not moeify.verify(Constant(dense), Constant(moe), {}).passed
        assert not moeify.verify(Constant(dense), Constant(moe), {}, exact=False).passed
    report = moeify.verify(Constant(half), Constant(half), {})
    assert report.passed and report.nan == 1 and report.max_abs_logit == 1


def test_special_tokens_stand_first_among_random_ones() -> None:
    ids = proof.random_inputs(tiny.build("llama"))["input_ids"]
    assert isinstance(ids, torch.Tensor) and ids[:, :3].tolist() == [[1, 2, 0]] * 2
    assert (ids[:, 3:] > 2).any()
    given = torch.tensor([[7, 8, 9, 10]])
    assert proof.random_inputs(tiny.build("llama"), {"input_ids": given})["input_ids"] is given


def test_what_is_wrong_outside_of_the_layers_is_refused_whatever_the_method() -> None:
    dense: Any = tiny.build("llama")
    moe: Any = moeify.convert(copy.deepcopy(dense), MoEConfig(3, 2, method="noise"))
    report = moeify.verify(dense, moe, exact=False)
    assert report.passed and report.outside is not None and report.outside < 1e-6 < report.relative
    moe.model.layers[1].self_attn.v_proj.weight.data[0, 0] += 0.1
    report = moeify.verify(dense, moe, exact=False)
    assert not report.passed and "outside of its MoE layers" in report.failure()


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(VerificationError, match=r"\(1, 2\), the MoE \(1, 3\)"):
        moeify.verify(Constant(torch.ones(1, 2)), Constant(torch.ones(1, 3)), {})


def test_models_keep_their_mode_and_get_random_inputs() -> None:
    dense, moe = tiny.build("vit").train(), tiny.build("vit").train()
    report = moeify.verify(dense, moe)
    assert report.relative == 0 and report.max_abs_logit > 0
    assert dense.training and moe.training


def test_a_model_without_floating_point_output_cannot_be_compared() -> None:
    silent: Any = Constant(torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(VerificationError, match="no floating-point"):
        moeify.verify(silent, silent, {})


class Drawing(nn.Module):
    """Answers with random numbers, as ViT-MAE does."""

    def forward(self) -> torch.Tensor:
        return torch.randn(2, 3)


def test_models_that_draw_numbers_draw_the_same_and_leave_the_state_alone() -> None:
    state = torch.get_rng_state()
    assert moeify.verify(Drawing(), Drawing(), {}).relative == 0
    assert torch.equal(torch.get_rng_state(), state)


def layers_loaded(monkeypatch: pytest.MonkeyPatch) -> list[FirstLayers | None]:
    """What the proof loads, the dense model first."""
    kept: list[FirstLayers | None] = []

    def spy(source: Any, layers: FirstLayers | None, **kwargs: Any) -> nn.Module:
        kept.append(layers)
        return load_first_layers(source, layers, **kwargs)

    monkeypatch.setattr(proof, "load_first_layers", spy)
    return kept


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "bert"])
def test_a_slice_holds_the_first_layers_and_what_is_around_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = tiny.save(tiny.build(name), tmp_path / "src")
    plan = tiny.convert_files(src, tmp_path / "moe", CONFIG)
    kept = layers_loaded(monkeypatch)
    with open_source(src) as source:
        assert proof.verify_slice(DenseCheckpoint(source), tmp_path / "moe", plan).passed
    assert [layers.count for layers in kept if layers] == [2, 2]


def test_a_model_of_two_stacks_is_compared_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tiny.save(tiny.build("t5"), tmp_path / "src")
    plan = tiny.convert_files(src, tmp_path / "moe", CONFIG)
    kept = layers_loaded(monkeypatch)
    with open_source(src) as source:
        assert proof.verify_slice(DenseCheckpoint(source), tmp_path / "moe", plan).passed
    assert kept == [None, None]


def test_the_rounding_that_was_asked_for_is_not_held_against_a_slice(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    plan = tiny.convert_files(src, tmp_path / "moe", CONFIG, dtype="BF16")
    with open_source(src) as source:
        assert proof.verify_slice(DenseCheckpoint(source), tmp_path / "moe", plan, cast_to="BF16").passed
        assert not proof.verify_slice(DenseCheckpoint(source), tmp_path / "moe", plan).passed
