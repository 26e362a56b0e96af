"""vLLM's llm-compressor, with the transformers that its release asks for."""

from __future__ import annotations

import json
from typing import Any

from sweeps.ecosystem.check import CONVERTED, LINE, NATIVE, Check
from sweeps.ecosystem.models import Subject, library, logits, words
from sweeps.ecosystem.quantized import expert_linears, judge


def w8a8(subject: Subject) -> None:
    """Quantize data-free and write a compressed checkpoint."""
    _data_free(subject, subject.load())


def w8a8_linearized(subject: Subject) -> None:
    """The same, experts as linear layers."""
    _data_free(subject, subject.linearized())


def gptq(subject: Subject) -> None:
    """Quantize by GPTQ on a few sentences."""
    _calibrated(subject, subject.load())


def gptq_linearized(subject: Subject) -> None:
    """The same, experts as linear layers."""
    _calibrated(subject, subject.linearized())


def _data_free(subject: Subject, model: Any) -> None:
    oneshot = library("llmcompressor").oneshot
    QuantizationModifier = library("llmcompressor.modifiers.quantization").QuantizationModifier

    expected = logits(model)
    recipe = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head", "re:.*router$", "re:.*gate$"])
    oneshot(model=model, recipe=recipe)
    _judge(subject, model, expected, 8)


def _calibrated(subject: Subject, model: Any) -> None:
    datasets = library("datasets")
    oneshot = library("llmcompressor").oneshot
    GPTQModifier = library("llmcompressor.modifiers.gptq").GPTQModifier

    expected = logits(model)
    tokenizer = subject.tokenizer()
    data = datasets.Dataset.from_list([dict(tokenizer(text)) for text in words(8)])
    recipe = GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head", "re:.*router$", "re:.*gate$"])
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=16, num_calibration_samples=8)
    _judge(subject, model, expected, 8)


def _judge(subject: Subject, model: Any, expected: Any, bits: int) -> None:
    held = expert_linears(model)
    assert held, "the experts were passed over: no linear layers"
    missed = [path for path, module in held.items() if not hasattr(module, "weight_scale")]
    assert not missed, f"{len(missed)} of {len(held)} projections of experts have no scale"
    judge(model, expected, bits)
    model.save_pretrained(subject.scratch / "compressed")
    config = json.loads((subject.scratch / "compressed/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


CHECKS = (
    Check("llmcompressor", "`oneshot` with `QuantizationModifier` (W8A8), experts too, written compressed", w8a8,
          CONVERTED + NATIVE, LINE, w8a8_linearized, environment="llmcompressor"),
    Check("llmcompressor", "`oneshot` with `GPTQModifier` (W8A8) on sentences, experts too", gptq,
          CONVERTED + NATIVE[:1], LINE, gptq_linearized, environment="llmcompressor"),
)  # fmt: skip
