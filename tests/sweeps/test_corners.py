"""Random corners: what is drawn is a corner of its type, and what is wrong is told."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import transformers

from sweeps import corners
from sweeps.dense_sources import SOURCES, build
from sweeps.families import Measured


@pytest.mark.parametrize("name", ["llama", "qwen3 window", "youtu", "smollm3"])
def test_what_is_drawn_are_fields_of_the_type_that_the_source_leaves_open(name: str) -> None:
    model_type, own = SOURCES[name]
    known = transformers.AutoConfig.for_model(model_type).to_dict().keys() | {"original_max_position_embeddings"}
    drawn = [corners.draw(name, random.Random(seed)) for seed in range(50)]
    assert drawn[3] == corners.draw(name, random.Random(3))
    assert len({json.dumps(fields, sort_keys=True) for fields in drawn}) > 20
    assert all(fields.keys() <= known - own.keys() for fields in drawn)


def test_an_exact_a_refused_and_a_wrong_conversion_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("smollm3 NoPE")
    assert corners.check("smollm3 NoPE", model) == {"granitemoe_swa": "exact", "mixtral": "refused"}

    def apart(self: Measured, *args: Any, **kwargs: Any) -> float:
        return 0.25

    monkeypatch.setattr(Measured, "difference", apart)
    assert corners.check("smollm3 NoPE", model) == {"granitemoe_swa": "2.5e-01", "mixtral": "2.5e-01"}


def test_the_record_has_no_wrong_conversion() -> None:
    record = json.loads(corners.RECORD.read_text())
    assert record["models"] >= 300 and record["exact"] >= 300 and record["wrong"] == []
