"""Model types of transformers, of many forms, against counts by names; docs/architectures.md has all of them."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"

# One of each form: pre- and post-norm, parallel, packed, transposed, encoder-decoder, two towers, a shared layer,
# convolutions, hybrids, MoE with dense layers and shared experts, token mixing, hyper-connections.
TYPES = ["albert", "bloom", "cohere", "convnext", "deepseek_v3", "gpt_bigcode", "gptj", "jamba", "mixtral", "qwen2_vl",
         "siglip", "whisper", "xlnet"]  # fmt: skip


@pytest.fixture(scope="module")
def sweep() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("generate_architectures", DOCS / "generate_architectures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(DOCS))  # as for a program that runs from there
    spec.loader.exec_module(module)
    sys.path.remove(str(DOCS))
    yield module
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("model_type", TYPES)
def test_found_as_expected(sweep: ModuleType, model_type: str) -> None:
    row = sweep.examine(model_type)
    assert row.problem == ""
    assert row.found == row.expected


def test_the_document_lists_every_type_and_accepts_no_look_alike(sweep: ModuleType) -> None:
    text = (DOCS / "architectures.md").read_text()
    listed = set(re.findall(r"^\| ([\w.-]+)[*†]* \|", text, flags=re.MULTILINE))
    assert listed - {"model"} >= set(sweep.model_types())
    summary = re.search(r"\d+ types: (\d+) with exactly the expected FFNs, (\d+) not \((\d+) of them", text)
    assert summary is not None
    right, wrong, look_alikes = map(int, summary.groups())
    assert look_alikes == 0
    assert right / (right + wrong) > 0.97
