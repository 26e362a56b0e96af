"""Model types of transformers, of many forms, against counts by names and the numbers that a person counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest

from benchmarks.record import read
from sweeps.architectures import RECORD, SAID, summary, table
from sweeps.examine import Row, examine
from sweeps.models import model_types

# The FFNs of two layers a stack. One type of each form: pre- and post-norm, parallel, packed, transposed,
# encoder-decoder, two towers, a shared layer, convolutions, hybrids, MoE with dense layers and shared experts, token
# mixing, hyper-connections, windows, bottlenecks, masked images.
FFNS = {
    "albert": 1, "bert": 2, "bloom": 2, "cohere": 2, "convnext": 4, "deepseek_v3": 2, "gpt_bigcode": 2, "gptj": 2,
    "jamba": 1, "llama4": 2, "mixtral": 0, "mobilebert": 8, "opt": 2, "phi3": 2, "qwen2_vl": 4, "siglip": 5, "swin": 4,
    "t5": 4, "vit_mae": 2, "whisper": 2, "xlnet": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def logging_is_restored() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("model_type", FFNS)
def test_found_as_expected(model_type: str) -> None:
    row = examine(model_type)
    assert row.problem == ""
    assert row.found == row.expected
    assert len(row.found) == FFNS[model_type]


def test_what_is_found_is_described() -> None:
    llama4, xlnet, mixtral = (examine(name) for name in ("llama4", "xlnet", "mixtral"))
    assert (llama4.forms, llama4.shared_experts, llama4.applier) == (("silu glu",), 2, "in place")
    assert (xlnet.forms, xlnet.applier) == (("gelu mlp",), "in place")
    assert mixtral.refused == ("all its FFNs are routed experts",) and mixtral.right


def test_every_type_has_one_task() -> None:
    types = model_types()
    assert len(types) > 500
    assert [types[name] for name in ("llama", "t5", "moonshine", "vit")] == ["causal LM", "seq2seq", "speech", "base"]


def test_the_page_says_what_the_record_holds() -> None:
    record, page = read(RECORD), RECORD.with_suffix(".md").read_text()
    assert SAID.format(**record.summary) in page.splitlines()
    rows = [row.split(" | ") for row in page.partition("|---|---|--:|")[2].splitlines()[1:]]
    assert {row[0].strip("| *†"): row[2] for row in rows} == record.runs
    counts = list(record.runs.values())
    assert len(counts) == record.summary["types"] and counts.count("-") == record.summary["not_examined"]
    assert sum("✗" in count for count in counts) == record.summary["wrong"]


def test_the_page_counts_and_marks_what_is_wrong() -> None:
    right = Row("a", "base", {"x.weight": (4, 8)}, {"x.weight": (4, 8)}, ("silu glu",), shared_experts=1, parts=1)
    missed, extra = replace(right, model_type="b", found={}), replace(right, model_type="c", expected={})
    rows = [right, missed, extra, Row("d", "base", problem="not built: ImportError: requires the timm library")]
    text = table(rows)
    assert summary(rows) == {"types": 4, "examined": 3, "right": 1, "wrong": 2, "extra": 1, "not_examined": 1}
    assert "4 types: 1 with exactly the expected FFNs, 2 not (1 of them with something that is no FFN), 1 that" in text
    assert "| part of it is a model of timm, which needs torchvision | 1: d |" in text
    assert "| a*† | base | 1 / 1 | silu glu |" in text
    assert "| b*† | base | 0 / 1 ✗ |" in text and "| c*† | base | 1 / 0 ✗ |" in text and "| d | base | - |" in text
