"""The tokens that a model is run on: of a given text, of one that every Python has, or random ones."""

from __future__ import annotations

import pydoc_data.topics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeify.checkpoint.source import Source
from moeify.errors import CheckpointError, ConfigError, told_as
from moeify.pretrained import load_tokenizer
from moeify.proving.proof import random_inputs
from moeify.report.watching import PASSAGE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENS, _WINDOW = 2048, 512
_LOGITS = 2**28  # of one forward pass: 1 GB


@dataclass(frozen=True)
class Tokens:
    """What a model is run on.

    Attributes:
        source: Where it is from, in words.
        inputs: Arguments of the forward.
        passage: The first tokens of the first sequence, as people read them.
        notes: What the reader must know of it.
    """

    source: str
    inputs: dict[str, object]
    passage: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether it says something, so that predicting it does too."""
        return bool(self.passage) and not self.notes

    @property
    def count(self) -> int:
        """How many tokens there are, without padding."""
        ids, mask = self.inputs.get("input_ids"), self.inputs.get("attention_mask")
        counted = mask.sum() if isinstance(mask, Tensor) else ids.numel() if isinstance(ids, Tensor) else 0
        return int(counted)


def sample_text() -> str:
    """Return a text that comes with every Python: its own documentation."""
    return "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def tokens_for(source: Source, model: PreTrainedModel, text: str | None, name: str) -> Tokens:
    """Return what a model is run on.

    Args:
        source: The checkpoint, with or without a tokenizer.
        model: Its model.
        text: What to run it on; None takes one that is there.
        name: What the text is called.

    Raises:
        ConfigError: The text has no tokens, or the model takes none.
    """
    if model.main_input_name != "input_ids":
        if text is not None:
            raise ConfigError(f"--text is for models of text, and {type(model).__name__} takes {model.main_input_name}")
        return Tokens("random values", random_inputs(model))
    if source.tokenizer_path is None:
        return _random(model, "there is no tokenizer beside the model")
    try:
        tokenizer = load_tokenizer(source.tokenizer_path)
        ids = _ids(tokenizer, sample_text()[: _TOKENS * 8] if text is None else text)
    except CheckpointError as error:
        return _random(model, f"its tokenizer cannot be used ({error})")
    if not ids:
        raise ConfigError(f"{name} gives no tokens: give a text with words that the tokenizer of {source.path} knows")
    vocab_size = int(model.config.get_text_config().vocab_size)
    if (largest := max(ids)) >= vocab_size:
        return _random(model, f"its tokenizer gives token {largest}, and the model has {vocab_size} tokens")
    ids = ids[: max(_WINDOW, min(_TOKENS, _LOGITS // vocab_size))]
    passage = tuple(str(tokenizer.decode([token])) for token in ids[:PASSAGE])
    return Tokens(name if text is not None else "Python's own documentation", _windows(model, ids), passage)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    with told_as("its tokenizer does not take the text", CheckpointError):
        return [int(token) for token in tokenizer(text, verbose=False)["input_ids"]]


def _windows(model: PreTrainedModel, ids: list[int]) -> dict[str, object]:
    """Return ids as windows of one length, the last one padded."""
    window = min(_WINDOW, len(ids))
    rows = [ids[start : start + window] for start in range(0, len(ids), window)]
    short = window - len(rows[-1])
    ids_BL = torch.tensor([*rows[:-1], rows[-1] + ids[:1] * short])
    inputs: dict[str, object] = {"input_ids": ids_BL}
    if short:
        mask_BL = torch.ones_like(ids_BL)
        mask_BL[-1, window - short :] = 0
        inputs["attention_mask"] = mask_BL
    return inputs | _decoder(model, ids_BL)


def _random(model: PreTrainedModel, why: str) -> Tokens:
    """Return ids that a model knows, for one without a tokenizer."""
    vocab_size = int(model.config.get_text_config().vocab_size)
    ids_BL = torch.randint(vocab_size, (2, _WINDOW // 2), generator=torch.Generator().manual_seed(0))
    inputs: dict[str, Any] = {"input_ids": ids_BL, **_decoder(model, ids_BL)}
    shown = tuple(map(str, ids_BL[0, :PASSAGE].tolist()))
    return Tokens("random token ids", inputs, shown, (f"{why}, so it ran on random token ids",))


def _decoder(model: PreTrainedModel, ids_BL: Tensor) -> dict[str, object]:
    return {"decoder_input_ids": ids_BL} if model.config.is_encoder_decoder else {}
