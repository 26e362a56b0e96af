from __future__ import annotations

from hashlib import sha256
from typing import Any

import pytest
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

from moeify.checkpoint import pre_tokenizers
from moeify.checkpoint.pre_tokenizers import TEXT, pre_tokenizer

BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA_3 = WORDS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def steps(*found: dict[str, Any], whole: bool = False) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(found)}, "model": {"ignore_merges": whole}}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"pre_tokenizer": BYTES}, "gpt-2"),
        (steps({"type": "Digits", "individual_digits": True}, BYTES), "smollm"),
        (steps({**SPLIT, "pattern": {"Regex": LLAMA_3}}, {**BYTES, "use_regex": False}, whole=True), "llama-bpe"),
        (steps({**SPLIT, "pattern": {"Regex": LLAMA_3.replace("{1,3}", "")}}, {**BYTES, "use_regex": False}), "qwen2"),
        (steps({**SPLIT, "pattern": {"Regex": PRETOKENIZE_REGEX}}, {**BYTES, "use_regex": False}), "qwen35"),
        (steps({**SPLIT, "pattern": {"Regex": LLAMA_3}}, {**BYTES, "use_regex": False}), None),  # merges are obeyed
        (steps({**SPLIT, "pattern": {"Regex": r"\d"}}, {**BYTES, "use_regex": False}), None),
        (steps({"type": "Digits", "individual_digits": False}, BYTES), None),
        ({"pre_tokenizer": {**BYTES, "add_prefix_space": True}}, None),
        ({"pre_tokenizer": None}, None),
    ],
)
def test_a_rule_is_known_by_what_it_says(spec: dict[str, Any], expected: str | None) -> None:
    assert pre_tokenizer([1, 2, 3], spec) == expected


def test_a_tokenizer_is_known_by_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """That comes first: several names stand for one rule, and llama.cpp's converter tells them so."""
    monkeypatch.setitem(pre_tokenizers._KNOWN, "olmo", (sha256(b"[1, 2, 3]").hexdigest()[:16],))
    assert pre_tokenizer([1, 2, 3], {"pre_tokenizer": BYTES}) == "olmo"
    assert pre_tokenizer([1, 2], {"pre_tokenizer": BYTES}) == "gpt-2"


def test_the_text_is_that_of_the_converter() -> None:
    assert sha256(TEXT.encode()).hexdigest().startswith("a36179c1e2b1cfcf")
