"""The tokenizer of a model folder as a GGUF file holds it.

Two kinds: byte-pair encoding of bytes, as in GPT-2, with its merges; and of characters, with bytes to fall back on, as
in Llama 2, for which llama.cpp wants a score of each token. What is special is found by the gguf library.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeify.checkpoint.pre_tokenizers import TEXT, pre_tokenizer
from moeify.errors import CheckpointError, told_as
from moeify.files.json_text import parse_json
from moeify.files.limits import VOCABULARY_VALUES
from moeify.files.reading import is_file, list_folder
from moeify.pretrained import load_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter, TokenType
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPACE = "\u2581"
_NO_SCORE = -10000.0
_LLAMA = "llama"
# Tokens of Gemma 4 that are part of what it says, as in llama.cpp's converter.
_SEEN = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
# Added tokens that llama.cpp's converter takes for special ones, whatever their tokenizer says.
_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>", re.DOTALL)


def add_vocabulary(writer: GGUFWriter, folder: Path, size: int, characters: str = _LLAMA) -> None:
    """Add the tokenizer of a folder to a GGUF file, or that there is none.

    Args:
        writer: Of the file.
        folder: The model folder; `tokenizer.json` is added to it if the tokenizer has other files only.
        size: The model's `vocab_size`.
        characters: llama.cpp's word for byte-pair encoding of characters: "llama", or another with merges.

    Raises:
        CheckpointError: llama.cpp has no such tokenizer, or transformers does not load it.
    """
    if not any(fnmatch(path.name, pattern) for path in list_folder(folder) for pattern in _FILES):
        writer.add_tokenizer_model("none")
        with quiet():  # some formats say the size anyway
            writer.add_vocab_size(size)
        return
    tokenizer = load_tokenizer(folder)
    spec = _spec(tokenizer)
    model: Mapping[str, Any] = spec["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"the tokenizer of {folder.name} is {model.get('type')}, and of those a language model has in a GGUF file "
            "only BPE is written here: write a folder"
        )
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= size:
        raise CheckpointError(
            f"the tokenizer of {folder.name} has a token {largest}, and the model's vocab_size is {size}: they do not "
            "belong together"
        )
    if not is_file(folder / "tokenizer.json"):
        save_tokenizer(tokenizer, folder)
    merges = not model.get("byte_fallback") or characters != _LLAMA
    if not merges:
        _add_characters(writer, tokenizer, spec, size)
    elif model.get("byte_fallback"):
        _add_merged_characters(writer, folder, size, characters)
    else:
        _add_bytes(writer, tokenizer, spec, size)
    _add_special(writer, tokenizer, folder, size, merges=merges)


def _spec(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what a `tokenizer.json` says of a tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(f"{type(tokenizer).__name__} has no tokenizer.json, which a GGUF file is made from")
    spec = parse_json(backend.to_str(), values=VOCABULARY_VALUES)
    assert isinstance(spec, dict)
    return spec


def _add_bytes(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, spec: Mapping[str, Any], size: int) -> None:
    name = pre_tokenizer(tokenizer.encode(TEXT), spec)
    if name is None:
        raise CheckpointError(
            "llama.cpp has no pre-tokenizer that cuts a text as this tokenizer does: write a folder, or start from a "
            "GGUF file of the dense model"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    tokens = _tokens(tokenizer, size)
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])


def _add_characters(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, spec: Mapping[str, Any], size: int) -> None:
    writer.add_tokenizer_model(_LLAMA)
    writer.add_tokenizer_pre("default")
    tokens, scores = _tokens(tokenizer, size), _scores(spec)
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([scores.get(text, _NO_SCORE) for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_add_space_prefix("".join(tokenizer.tokenize("a")).startswith(_SPACE))


def _add_merged_characters(writer: GGUFWriter, folder: Path, size: int, word: str) -> None:
    from gguf import LlamaHfVocab, TokenType

    with quiet(), told_as("the gguf library does not read the tokenizer's files", CheckpointError):
        tokens = list(LlamaHfVocab(folder).all_tokens())
    told = {text: TokenType.USER_DEFINED for text in _SEEN}
    tokens += [(f"[PAD{number}]".encode(), _NO_SCORE, TokenType.UNUSED) for number in range(len(tokens), size)]
    writer.add_tokenizer_model(word)
    writer.add_token_list([text for text, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([told.get(text.decode(), kind) for text, _, kind in tokens])
    writer.add_add_space_prefix(False)


def _tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> list[tuple[str, TokenType]]:
    """Return each token with its kind, as llama.cpp's converter tells them; numbers without a token are padding."""
    from gguf import TokenType

    words = {number: word for word, number in tokenizer.get_vocab().items()}
    added, unknown = tokenizer.added_tokens_decoder, tokenizer.unk_token_id
    found: list[tuple[str, TokenType]] = []
    for number in range(size):
        word, extra = words.get(number), added.get(number)
        if word is None:
            found.append((f"[PAD{number}]", TokenType.UNUSED))
        elif extra is None:
            kind = TokenType.BYTE if _BYTE.fullmatch(word) else TokenType.NORMAL
            found.append((word, TokenType.UNKNOWN if number == unknown else kind))
        else:
            if not extra.normalized:  # llama.cpp looks for it in the text as it is
                word = str(tokenizer.decode(tokenizer.encode(word, add_special_tokens=False)))
            if extra.special or _SPECIAL.fullmatch(word):
                found.append((word, TokenType.CONTROL))
            else:
                found.append((word.replace(_SPACE, " "), TokenType.USER_DEFINED))
    return found


def _scores(spec: Mapping[str, Any]) -> dict[str, float]:
    """Return scores by which llama.cpp merges in the order of the merges: the earlier, the higher."""
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in spec["model"]["merges"])
    order = dict.fromkeys("".join(merge) for merge in merges)
    return {word: -float(place) for place, word in enumerate(order)}


def _add_special(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, folder: Path, size: int, *, merges: bool
) -> None:
    """Add merges, the numbers of special tokens, which of them begin and end a text, and the chat template."""
    from gguf import SpecialVocab

    with quiet(), told_as("the gguf library does not read the tokenizer's files", CheckpointError):
        special = SpecialVocab(folder, load_merges=merges, n_vocab=size)
        ids = tokenizer.encode("a")
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        special.add_special_token["bos"] = ids[0] == bos
        if ids[-1] == eos or "eos" in special.add_special_token:
            special.add_special_token["eos"] = ids[-1] == eos
        special.add_to_gguf(writer, quiet=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's remarks from the terminal: what matters of them is checked here."""
    loggers = [logging.getLogger(name) for name in ("gguf.vocab", "gguf.gguf_writer", "metadata")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
