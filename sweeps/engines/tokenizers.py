"""Tokenizers of the forms that llama.cpp's converter looks for. Tokens are given by number: no form changes a result.

It is SmolLM2's, as moeify writes it from a GGUF file, with words of GLM and Solar. Gemma's has a word for each row of
the embedding, and bytes to fall back to; ERNIE's is a file of sentencepiece.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from moeify.cli.demo import model_file
from moeify.pretrained import load_tokenizer, save_tokenizer

_WORDS = ("[gMASK]", "<|user|>", "<|observation|>", "<unk>", "<|startoftext|>", "<|a|>", "<|b|>", "<|c|>")
VOCABULARY = 49_152 + len(_WORDS)
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # kinds of pieces


def write(folder: Path) -> None:
    """Write SmolLM2's tokenizer with the words."""
    tokenizer = load_tokenizer(model_file())
    tokenizer.add_special_tokens({"additional_special_tokens": list(_WORDS)})
    save_tokenizer(tokenizer, folder)


def suit(folder: Path, family: str) -> None:
    """Give a checkpoint the form that its family needs."""
    if family == "gemma4_text":
        file = folder / "tokenizer.json"
        data = json.loads(file.read_text())
        data["model"]["byte_fallback"] = True
        data["decoder"] = {"type": "Sequence", "decoders": []}
        file.write_text(json.dumps(data))
    elif family == "ernie4_5_moe":
        (folder / "tokenizer.model").write_bytes(_pieces())


def _pieces() -> bytes:
    """Return a vocabulary of bytes."""
    protocol: Any = import_module("transformers.utils.sentencepiece_model_pb2_new")
    model = protocol.ModelProto()
    model.trainer_spec.byte_fallback = True
    bytes_ = {f"<0x{byte:02X}>": _BYTE for byte in range(256)}
    kinds = {"<unk>": _UNKNOWN, "<s>": _CONTROL, "</s>": _CONTROL, **bytes_, "\u2581": _NORMAL}
    for piece, kind in kinds.items():
        model.pieces.add(piece=piece, score=0.0, type=kind)
    found: bytes = model.SerializeToString()
    return found
