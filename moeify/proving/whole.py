"""The proof of a whole conversion: two checkpoints, one after the other, with a few layers in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeify.checkpoint.source import Source, open_source
from moeify.errors import ConfigError
from moeify.hub.streaming import load_streamed
from moeify.hub.structure import load_structure
from moeify.pretrained import load_tokenizer
from moeify.proving.layers import answering, can_answer, chains_of, comparing, recording, reports
from moeify.proving.proof import difference_outside, plainly, random_inputs, round_weights, run
from moeify.proving.record import read_promise
from moeify.proving.report import VerifyReport, compare
from moeify.proving.stored import altered_tensors
from moeify.tracing.skeleton import build_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_TOKENS = 512  # of a text


def verify_checkpoints(dense: Path, moe: Path, *, text: str | None = None) -> VerifyReport:
    """Compare two checkpoints: layers on equal inputs in float64, logits in float32, and stored tensors with the plan.

    If the conversion was told to store another dtype, the dense weights are rounded to it first: the proof is about the
    conversion, not about the rounding that was asked for.

    Args:
        dense: A folder or GGUF file; tensors that its model has no place for are left out, as a conversion does.
        moe: A folder.
        text: Text to run them on, through the tokenizer beside the MoE; None takes random token ids.

    Raises:
        CheckpointError: A tensor of either is missing, one of the MoE is unexpected, or its record is damaged.
        ConfigError: The text has no tokens, or the model takes none.
    """
    promise = read_promise(moe)
    ids = None if text is None else _token_ids(moe, text)
    with open_source(moe) as converted:
        with open_source(dense) as source:
            wanted = chains_of(_structure(converted))
            before = _run(source, partial(_inputs, ids), promise.cast_to, partial(recording, chains=wanted), unused=True)
            altered = () if promise.plan is None else altered_tensors(source, converted, promise.plan, promise.cast_to)
        again: dict[str, Any] = {"inputs": lambda _: before.inputs, "cast_to": None, **plainly(converted)}
        after = _run(converted, around=partial(comparing, calls=before.kept), **again)
        outside = None
        if can_answer(after.kept):
            answered = _run(converted, around=partial(answering, calls=before.kept), without=tuple(after.kept), **again)
            outside = difference_outside(answered.logits, before.logits)
    report = compare(
        before.logits, after.logits, exact=promise.exact, layers=reports(after.kept), outside=outside
    )
    return replace(report, unused=before.unused, altered=altered, passed=report.passed and not altered)


def _structure(moe: Source) -> nn.Module:
    """Return a model of the MoE's layers without weights; in moeify format, with its plan."""
    return build_on_meta(moe.config) if "quantization_config" not in moe.config else load_structure(moe)


@dataclass(frozen=True)
class _Run:
    """What went into a model, what came out, what was kept meanwhile, and stored tensors that it has no place for."""

    inputs: dict[str, object]
    logits: Tensor
    kept: Any
    unused: tuple[str, ...]


def _run(
    source: Source,
    inputs: Callable[[PreTrainedModel], dict[str, object]],
    cast_to: str | None,
    around: Callable[[nn.Module], AbstractContextManager[Any]],
    **kwargs: Any,
) -> _Run:
    """Load a model, run it with something around it and forget it."""

    def attempt(**options: bool) -> _Run:
        model, unused = load_streamed(source, partial(round_weights, dtype=cast_to), **options, **kwargs)
        arguments = inputs(model)
        with around(model) as kept:
            logits = run(model, arguments).cpu()  # what has no values cannot move to the CPU
        return _Run(arguments, logits, kept, unused)

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
