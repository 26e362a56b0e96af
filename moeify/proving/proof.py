"""Verify checkpoints: whole, or a slice of a few layers so that the memory does not grow with the depth."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeify.checkpoint.source import open_source
from moeify.checkpoint.tensor_info import torch_dtype
from moeify.conversion.checkpoint import PLAN_FILE
from moeify.conversion.dense import DenseCheckpoint
from moeify.hub.loading import Slice, load, load_slice
from moeify.plan import Plan
from moeify.proving.verification import VerifyReport, random_inputs, verify

_SLICE = 2  # converted layers in a slice
_NUMBERED = re.compile(r"(?P<stack>(?:[^.]+\.)*?)(?P<number>\d+)\.")
_PLAIN = {"experts_implementation": "eager"}  # transformers' default needs widths of whole 16 bytes


def verify_checkpoints(dense: Path, moe: Path, *, text: str | None = None) -> VerifyReport:
    """Load both checkpoints whole, in float32, and compare their logits.

    Where the conversion was told to store another dtype, the dense weights are rounded to it first: what is proved is
    the conversion, not the rounding that was asked for.

    Args:
        dense: A folder or GGUF file.
        moe: A folder.
        text: Text to run them on, through the tokenizer beside the MoE; None takes random token ids.

    Raises:
        CheckpointError: a tensor of either is missing or unexpected.
    """
    dense_model, moe_model = load(dense, dtype=torch.float32), load(moe, dtype=torch.float32, **_PLAIN)
    record = _record(moe)
    if record.get("cast_to"):
        _round(dense_model, torch_dtype(record["cast_to"]))
    inputs = None if text is None else _tokens(moe, text)
    return verify(dense_model, moe_model, inputs, exact=_promises_equality(record))


def verify_slice(dense: DenseCheckpoint, moe: Path, plan: Plan, *, cast_to: str | None = None) -> VerifyReport:
    """Compare the first layers of a dense checkpoint and of its MoE, up to the second converted one, in float32.

    Models that are not one stack of numbered layers are compared whole.

    Args:
        dense: The dense checkpoint.
        moe: The folder that was written.
        plan: What was converted.
        cast_to: safetensors name of the dtype that the output was told to store, if it was.

    Raises:
        CheckpointError: a tensor of either is missing or unexpected.
    """
    after = first_layers(dense, plan)
    before = None if after is None else replace(after, stack=_stack_on_disk(dense, plan))
    with open_source(moe) as converted:
        dense_model, moe_model = load_slice(dense.source, before), load_slice(converted, after, **_PLAIN)
        if cast_to:
            _round(dense_model, torch_dtype(cast_to))
        inputs = random_inputs(dense_model, like=dense.example_inputs)
        return verify(dense_model, moe_model, inputs, exact=plan.config.exact)


def first_layers(dense: DenseCheckpoint, plan: Plan) -> Slice | None:
    """Return the layers up to the second converted one; None when the FFNs are not in one stack that can be cut."""
    numbered = [found for site in plan.sites if (found := _NUMBERED.match(site.path))]
    stacks = {found["stack"] for found in numbered}
    counted = hasattr(dense.model.config, "num_hidden_layers")
    if len(numbered) < len(plan.sites) or len(stacks) > 1 or not counted:
        return None
    numbers = sorted(int(found["number"]) for found in numbered)
    return Slice(stacks.pop(), numbers[:_SLICE][-1] + 1)


def _stack_on_disk(dense: DenseCheckpoint, plan: Plan) -> str:
    """Return how the tensors of the first converted layer begin in the dense checkpoint, whose names may be older."""
    found = _NUMBERED.match(dense.names.of[plan.sites[0].down.parameter])
    return found["stack"] if found else ""


def _tokens(folder: Path, text: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    return {"input_ids": ids[:, :512]}


def _record(moe: Path) -> dict[str, Any]:
    """What moeify wrote beside a checkpoint; nothing for one that it did not make."""
    path = moe / PLAN_FILE
    data: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return data


def _promises_equality(record: dict[str, Any]) -> bool:
    """Whether the method that made a checkpoint is exact; one without a record is held to equality."""
    return Plan.from_dict(record).config.exact if record else True


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every weight the value that it has in a narrower dtype."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
