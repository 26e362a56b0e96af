"""Intel's auto-round: 4-bit weights by rounding to nearest and by sign gradient descent."""

from __future__ import annotations

from typing import Any

from sweeps.ecosystem.check import CONVERTED, LINE, NATIVE, Check
from sweeps.ecosystem.models import Subject, library, logits, words
from sweeps.ecosystem.quantized import expert_linears, judge


def rtn(subject: Subject) -> None:
    """Round to nearest."""
    _quantize(subject, subject.load(), iters=0)


def tuned(subject: Subject) -> None:
    """Tune the rounding for a few steps on sentences."""
    _quantize(subject, subject.load(), iters=2)


def rtn_linearized(subject: Subject) -> None:
    """Round to nearest, experts as linear layers."""
    _quantize(subject, subject.linearized(), iters=0)


def tuned_linearized(subject: Subject) -> None:
    """Tune the rounding, experts as linear layers."""
    _quantize(subject, subject.linearized(), iters=2)


def _quantize(subject: Subject, model: Any, iters: int) -> None:
    AutoRound = library("auto_round").AutoRound

    expected = logits(model)
    tokenizer = subject.tokenizer()
    rows = [tokenizer(" ".join(words()), return_tensors="pt")["input_ids"][:, :32] for _ in range(4)]
    rounder: Any = AutoRound(
        model, tokenizer, scheme="W4A16", iters=iters, nsamples=4, seqlen=32, batch_size=2, dataset=rows,
        device_map="cpu", group_size=32,
    )  # fmt: skip
    quantized, _ = rounder.quantize()
    assert expert_linears(quantized), "the experts were passed over"
    judge(quantized, expected, 4)


CHECKS = (
    Check("auto-round", "W4A16, rounding to nearest, experts too", rtn, CONVERTED + NATIVE, LINE, rtn_linearized),
    Check(
        "auto-round", "W4A16, tuned on sentences, experts too", tuned, CONVERTED + NATIVE[:1], LINE, tuned_linearized
    ),
)
