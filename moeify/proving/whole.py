"""The proof of a whole conversion: two checkpoints, one after the other, with a few layers in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from moeify.checkpoint.source import Accepted, Source, open_source
from moeify.errors import CheckpointError, ConfigError, told_as
from moeify.hub.loading import load_structure
from moeify.hub.streaming import load_streamed, whole_if_needed
from moeify.plan import stored_plan
from moeify.pretrained import load_tokenizer
from moeify.proving.layers import Calls, Chains, chains_of, comparing, recording, reports
from moeify.proving.proof import difference_outside, plainly, random_inputs, round_weights, run
from moeify.proving.record import read_promise
from moeify.proving.report import VerifyReport, compare
from moeify.proving.stored import altered_tensors
from moeify.tracing.skeleton import build_on_meta

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_TOKENS = 512  # of a text
_DO_NOT_RUN = "the models do not run on what both are given: give a dense model and the MoE that was made of it"


def verify_checkpoints(
    dense: Path, moe: Path, *, text: str | None = None, **accepted: Unpack[Accepted]
) -> VerifyReport:
    """Compare two checkpoints: layers on equal inputs in float64, logits in float32, and stored tensors with the plan.

    If the conversion was told to store another dtype, the dense weights are rounded to it first: the proof is about the
    conversion, not about the rounding that was asked for.

    Args:
        dense: A folder or GGUF file; tensors that its model has no place for are left out, as a conversion does.
        moe: A folder.
        text: Text to run them on, through the tokenizer beside the MoE; None takes random token ids.
        accepted: As for `open_source`, for the dense checkpoint; of the MoE only a config that names code, which is
            not run here either.

    Raises:
        CheckpointError: A tensor of either is missing, one of the MoE is unexpected, or its record is damaged.
        ConfigError: The text has no tokens, or the model takes none.
        VerificationError: A model does not run on these inputs.
    """
    promise = read_promise(moe)
    ids = None if text is None else _token_ids(moe, text)
    with open_source(moe, trust_remote_code=accepted.get("trust_remote_code", False)) as converted:
        with open_source(dense, **accepted) as source:
            before = _run_dense(source, partial(_inputs, ids), promise.cast_to, chains_of(_structure(converted)))
            altered = () if promise.plan is None else altered_tensors(source, converted, promise.plan, promise.cast_to)
        report = _run_moe(converted, before, promise.exact)
    return replace(report, unused=before.unused, altered=altered, passed=report.passed and not altered)


def _structure(moe: Source) -> nn.Module:
    """Return a model of the MoE's layers without weights; in moeify format, with its plan."""
    return build_on_meta(moe.config) if stored_plan(moe.config) is None else load_structure(moe)


@dataclass(frozen=True)
class _Dense:
    """What went into the dense model, what came out, what its FFNs did, and tensors that it has no place for."""

    inputs: dict[str, object]
    logits: Tensor
    calls: Calls
    unused: tuple[str, ...]


def _run_dense(
    source: Source, inputs: Callable[[PreTrainedModel], dict[str, object]], cast_to: str | None, chains: Chains
) -> _Dense:
    def attempt(whole: bool) -> _Dense:
        model, unused = load_streamed(source, partial(round_weights, dtype=cast_to), unused=True, whole=whole)
        arguments = inputs(model)
        with recording(model, chains) as calls:
            logits = run(model, arguments).cpu()  # what has no values cannot move to the CPU
        return _Dense(arguments, logits, calls, unused)

    return whole_if_needed(attempt, _DO_NOT_RUN)


def _run_moe(source: Source, dense: _Dense, exact: bool) -> VerifyReport:
    def attempt(whole: bool) -> VerifyReport:
        idle: set[str] = set()
        options: dict[str, Any] = {"whole": whole, "without": idle, **plainly(source)}
        model, _ = load_streamed(source, lambda _: None, **options)
        with comparing(model, dense.calls) as comparers:
            logits = run(model, dense.inputs).cpu()
        idle.update(comparers)
        outside = difference_outside(model, comparers, dense.calls, dense.inputs, dense.logits)
        return compare(dense.logits, logits, exact=exact, layers=reports(comparers), outside=outside)

    return whole_if_needed(attempt, _DO_NOT_RUN)


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
    with told_as(f"{folder}: its tokenizer does not take the text", CheckpointError):
        ids = load_tokenizer(folder)(text)["input_ids"][:_MAX_TOKENS]
    if not ids:
        raise ConfigError(f"the text gives no tokens: give one with words that the tokenizer of {folder} knows")
    return torch.tensor([ids])
