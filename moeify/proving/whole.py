"""The proof of a whole conversion: two checkpoints, one after the other, with a few layers in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeify.checkpoint.source import Source, open_source
from moeify.errors import ConfigError, VerificationError, told_as
from moeify.hub.streaming import load_streamed
from moeify.pretrained import load_tokenizer
from moeify.proving.proof import VerifyReport, compare, plainly, random_inputs, round_weights, run
from moeify.proving.record import read_promise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_TOKENS = 512  # of a text


def verify_checkpoints(dense: Path, moe: Path, *, text: str | None = None) -> VerifyReport:
    """Compare the logits of two checkpoints in float32.

    If the conversion was told to store another dtype, the dense weights are rounded to it first: the proof is about the
    conversion, not about the rounding that was asked for.

    Args:
        dense: A folder or GGUF file; tensors that its model has no place for are left out, as a conversion does.
        moe: A folder.
        text: Text to run them on, through the tokenizer beside the MoE; None takes random token ids.

    Raises:
        CheckpointError: A tensor of either is missing, one of the MoE is unexpected, or its record is damaged.
        ConfigError: The text has no tokens, or the model takes none.
        VerificationError: A model does not run on these inputs.
    """
    promise = read_promise(moe)
    ids = None if text is None else _token_ids(moe, text)
    with open_source(dense) as source:
        before = _run(source, partial(_inputs, ids), promise.cast_to, unused=True)
    with open_source(moe) as source:
        after = _run(source, lambda _: before.inputs, None, **plainly(source))
    return compare(before.logits, after.logits, exact=promise.exact, unused=before.unused)


@dataclass(frozen=True)
class _Run:
    """What went into a model, what came out, and the names of stored tensors that it has no place for."""

    inputs: dict[str, object]
    logits: Tensor
    unused: tuple[str, ...]


def _run(
    source: Source, inputs: Callable[[PreTrainedModel], dict[str, object]], cast_to: str | None, **kwargs: Any
) -> _Run:
    """Load a model, run it and forget it."""

    def attempt(**options: bool) -> _Run:
        model, unused = load_streamed(source, partial(round_weights, dtype=cast_to), **options, **kwargs)
        arguments = inputs(model)
        return _Run(arguments, run(model, arguments).cpu(), unused)  # what has no values cannot move to the CPU

    what = (
        f"{source.path} does not run on what both models are given: give a dense model and the MoE that was made of it"
    )
    try:
        with told_as(what, VerificationError):
            try:
                return attempt()
            except RuntimeError:  # torch's, of a model that reads a weight of a layer outside of that layer
                return attempt(whole=True)
    finally:
        gc.collect()  # the hooks of its layers know the model, so it would stay


def _inputs(ids: Tensor | None, model: PreTrainedModel) -> dict[str, object]:
    """Return a model's inputs: token ids, or random ones of its own kind."""
    if ids is None:
        return random_inputs(model)
    if model.main_input_name != "input_ids":
        raise ConfigError(f"--text is for models of text, and {type(model).__name__} takes {model.main_input_name}")
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, **decoder}


def _token_ids(folder: Path, text: str) -> Tensor:
    """Return the first tokens of a text, (1, L)."""
    ids = load_tokenizer(folder)(text)["input_ids"][:_MAX_TOKENS]
    if not ids:
        raise ConfigError(f"the text gives no tokens: give one with words that the tokenizer of {folder} knows")
    return torch.tensor([ids])
