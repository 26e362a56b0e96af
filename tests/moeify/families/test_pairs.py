"""Every dense source becomes every family that says it is exact, loads in transformers alone, and computes the same.

docs/families.json is the record: what is exact here and refused there, or the other way round, is out of date.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moeify.config import MoEConfig
from moeify.conversion.checkpoint import plan_checkpoint
from moeify.conversion.module import put_layers
from moeify.families.table import FAMILIES
from moeify.measure import TOLERANCE, relative_difference
from sweeps.dense_sources import SOURCES, build
from sweeps.families import NOISE, RESULTS, Measured, logits, measure
from tests.moeify import native

RECORD = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
LIMIT = TOLERANCE["float32"]
Open = Callable[[str], Measured]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Each source is built and traced once."""
    kept: dict[str, Measured] = {}

    def open_once(name: str) -> Measured:
        if name not in kept:
            kept[name] = Measured(build(name), tmp_path_factory.mktemp("source"))
        return kept[name]

    yield open_once


@pytest.mark.parametrize("name", SOURCES)
def test_what_the_record_says_is_exact_is_exact_and_the_rest_is_refused(name: str, opened: Open) -> None:
    measured = measure(name, opened(name))
    assert measured.keys() == RECORD[name].keys()
    for target, found in measured.items():
        if "refused" in RECORD[name][target]:
            assert found == RECORD[name][target]
        elif target == "gpt_oss" and native.OLD:
            assert "by transformers 5.24 and newer only" in found["refused"]
        else:
            assert max(found["copies"], found["differing"]) < LIMIT, target


def test_experts_with_noise_differ(opened: Open) -> None:
    source = opened("llama")
    noisy = copy.deepcopy(source.model)
    put_layers(noisy, plan_checkpoint(source.dense, NOISE), source.dense.regions)
    assert relative_difference(logits(noisy), logits(source.model)) > 0.01


@pytest.mark.parametrize("target", [name for name, family in FAMILIES.items() if family.shared])
def test_shared_experts_and_shards_are_held_as_one_wide_ffn(target: str, opened: Open) -> None:
    name = next(iter(FAMILIES[target].sources))
    for settings in ({"shared_experts": 1}, {"granularity": 2, "shared_experts": 3}):
        for method in ("copy", NOISE.method):
            config = MoEConfig(4, 2, method=method, **settings)  # type: ignore[arg-type]
            assert opened(name).difference(target, config) < LIMIT, settings


@pytest.mark.parametrize("target", [name for name, family in FAMILIES.items() if family.dense != "none"])
def test_layers_stay_dense_where_a_family_can_say_so(target: str, opened: Open) -> None:
    for name in FAMILIES[target].sources:
        assert opened(name).difference(target, MoEConfig(4, 2, method=NOISE.method), layers="1") < LIMIT, name


def test_the_page_is_written_from_the_record() -> None:
    from sweeps.families import PAGE, page

    assert PAGE.read_text() == page(RECORD)


def test_every_source_of_every_family_is_built_and_exact_in_some_corner() -> None:
    for target, family in FAMILIES.items():
        for source in family.sources:
            corners = [RECORD[name][target] for name, (model_type, _) in SOURCES.items() if model_type == source]
            assert any("copies" in found for found in corners), (source, target)


def test_the_record_is_kept_beside_the_page() -> None:
    assert Path(__file__).resolve().parents[3] / "docs/families.json" == RESULTS
