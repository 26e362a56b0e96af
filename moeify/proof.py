"""Verify checkpoints: whole, or a slice of a few layers so that the memory does not grow with the depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from moeify.checkpoint.source import Source, open_source
from moeify.config import MoEConfig
from moeify.loading import load, load_slice, numbered_layer
from moeify.plan import Plan
from moeify.verification import VerifyReport, verify

_SLICE = 2  # converted layers in a slice
_PLAIN = {"experts_implementation": "eager"}  # transformers' default needs widths of whole 16 bytes


def verify_checkpoints(dense: Path, moe: Path, *, text: str | None = None) -> VerifyReport:
    """Load both checkpoints whole, in float32, and compare their logits.

    Args:
        dense: A folder or GGUF file.
        moe: A folder.
        text: Text to run them on, through the tokenizer beside the MoE; None takes random token ids.

    Raises:
        CheckpointError: a tensor of either is missing or unexpected.
    """
    dense_model, moe_model = load(dense, dtype=torch.float32), load(moe, dtype=torch.float32, **_PLAIN)
    inputs = None if text is None else _tokens(moe, text)
    return verify(dense_model, moe_model, inputs, exact=_promises_equality(moe))


def verify_slice(source: Source, moe: Path, plan: Plan) -> VerifyReport:
    """Compare the first layers of a dense checkpoint and of its MoE, up to the second converted one, in float32.

    Models that are not one stack of numbered layers are compared whole.

    Args:
        source: The opened dense checkpoint.
        moe: The folder that was written.
        plan: What was converted.

    Raises:
        CheckpointError: a tensor of either is missing or unexpected.
    """
    layers = _slice_length(source, plan)
    with open_source(moe) as converted:
        before, after = load_slice(source, layers), load_slice(converted, layers, **_PLAIN)
        return verify(before, after, exact=plan.config.exact)


def _slice_length(source: Source, plan: Plan) -> int | None:
    """How many layers to keep; None to keep all."""
    numbers = [numbered_layer(site.path) for site in plan.sites]
    if source.config.get("is_encoder_decoder") or None in numbers:
        return None
    return sorted(n for n in numbers if n is not None)[:_SLICE][-1] + 1


def _tokens(folder: Path, text: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    return {"input_ids": ids[:, :512]}


def _promises_equality(moe: Path) -> bool:
    """Whether the method that made a checkpoint is exact; one without a record is held to equality."""
    record = moe / "moeify.json"
    if not record.is_file():
        return True
    return MoEConfig(**json.loads(record.read_text())["config"]).exact
