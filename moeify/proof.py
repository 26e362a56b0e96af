"""Verify checkpoints: whole, or a slice of a few layers so that the memory does not grow with the depth."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moeify.checkpoint.source import Source, open_source
from moeify.config import MoEConfig
from moeify.loading import Slice, load, load_slice
from moeify.plan import Plan
from moeify.skeleton import build_on_meta, config_of, stored_names
from moeify.verification import VerifyReport, verify

_SLICE = 2  # converted layers in a slice
_NUMBERED = re.compile(r"(?P<stack>(?:[^.]+\.)*?)(?P<number>\d+)\.")
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
    after = _slice(source, plan)
    before = None if after is None else replace(after, stack=_stack_on_disk(source, plan))
    with open_source(moe) as converted:
        dense_model, moe_model = load_slice(source, before), load_slice(converted, after, **_PLAIN)
        return verify(dense_model, moe_model, exact=plan.config.exact)


def _slice(source: Source, plan: Plan) -> Slice | None:
    """The layers up to the second converted one; None when the converted FFNs are not in one stack that can be cut."""
    numbered = [found for site in plan.sites if (found := _NUMBERED.match(site.path))]
    stacks = {found["stack"] for found in numbered}
    if len(numbered) < len(plan.sites) or len(stacks) > 1 or not hasattr(config_of(source.config), "num_hidden_layers"):
        return None
    numbers = sorted(int(found["number"]) for found in numbered)
    return Slice(stacks.pop(), numbers[:_SLICE][-1] + 1)


def _stack_on_disk(source: Source, plan: Plan) -> str:
    """How the tensors of the first converted layer begin in the dense checkpoint, whose names may be older."""
    names = stored_names(build_on_meta(source.config), source.tensors)
    found = _NUMBERED.match(names.of[plan.sites[0].down.parameter])
    return found["stack"] if found else ""


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
