"""Small tokenizers of both kinds as a GGUF file holds them, and those that it cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moeify.checkpoint.gguf_vocabulary import add_vocabulary
from moeify.errors import CheckpointError

BYTES, CHARACTERS = (
    ["a", "b", "c", "ab", "abc", "\u0120"],
    ["<unk>", "<s>", "<0x61>", "\u2581", "a", "b", "ab", "\u2581ab"],
)


def byte_level(**changes: Any) -> Any:
    model = models.BPE({word: number for number, word in enumerate(BYTES)}, [("a", "b"), ("ab", "c")], **changes)
    made: Any = Tokenizer(model)
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


def of_characters() -> Any:
    numbers = {word: number for number, word in enumerate(CHARACTERS)}
    merges = [("a", "b"), ("\u2581", "ab")]
    made: Any = Tokenizer(models.BPE(numbers, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def saved(made: Any, folder: Path, **special: Any) -> Path:
    build: Any = PreTrainedTokenizerFast
    tokenizer = build(tokenizer_object=made, **special)
    tokenizer.add_tokens([AddedToken("<|user|>", special=False), AddedToken("word", special=False, normalized=False)])
    tokenizer.save_pretrained(folder)
    return folder


def held(folder: Path, size: int, characters: str = "llama") -> dict[str, Any]:
    """The keys that a file gets, without what they begin with."""
    writer = gguf.GGUFWriter(None, "llama")
    add_vocabulary(writer, folder, size, characters)
    return {key.removeprefix("tokenizer.ggml."): value.value for key, value in writer.kv_data[0].items()}


def test_bytes(tmp_path: Path) -> None:
    folder = saved(byte_level(), tmp_path, eos_token="</s>", pad_token="<pad>", chat_template="{{ messages }}")
    found, kind = held(folder, 11), gguf.TokenType
    assert found["model"] == "gpt2" and found["pre"] == "gpt-2" and found["merges"] == ["a b", "ab c"]
    assert found["tokens"] == [*BYTES, "</s>", "<pad>", "<|user|>", "word", "[PAD10]"]
    special = [kind.CONTROL] * 3  # the chat's too, though the tokenizer does not say so
    assert found["token_type"] == [*[kind.NORMAL] * 6, *special, kind.USER_DEFINED, kind.UNUSED]
    assert (found["eos_token_id"], found["padding_token_id"]) == (6, 7)
    assert found["add_bos_token"] is False and "add_eos_token" not in found
    assert found["tokenizer.chat_template"] == "{{ messages }}"


def test_characters(tmp_path: Path) -> None:
    found, kind = held(saved(of_characters(), tmp_path, bos_token="<s>", unk_token="<unk>"), 10), gguf.TokenType
    assert found["model"] == "llama" and found["pre"] == "default" and "merges" not in found
    assert found["tokens"][:8] == CHARACTERS
    assert found["token_type"][:4] == [kind.CONTROL, kind.CONTROL, kind.BYTE, kind.NORMAL]
    assert found["scores"][6:8] == [0.0, -1.0] and max(found["scores"][:6]) < -1  # merged in this order
    assert found["add_bos_token"] is True and found["add_space_prefix"] is True and found["bos_token_id"] == 1


def test_merged_characters(tmp_path: Path) -> None:
    folder = saved(
        of_characters(), tmp_path, bos_token="<s>", unk_token="<unk>", additional_special_tokens=["<|tool_call>"]
    )
    found, kind = held(folder, 12, "gemma4"), gguf.TokenType
    assert found["model"] == "gemma4" and "pre" not in found and found["merges"] == ["a b", "\u2581 ab"]
    assert [text.decode() for text in found["tokens"]] == [*CHARACTERS, "<|tool_call>", "<|user|>", "word", "[PAD11]"]
    assert found["token_type"][:4] == [kind.CONTROL, kind.CONTROL, kind.BYTE, kind.NORMAL]
    assert found["token_type"][8:] == [kind.USER_DEFINED] * 3 + [kind.UNUSED]  # the first is part of what it says
    assert len(set(found["scores"][:11])) == 1 and found["add_space_prefix"] is False


def test_a_token_that_the_model_does_not_have(tmp_path: Path) -> None:
    folder = saved(byte_level(), tmp_path, eos_token="</s>")
    (folder / "config.json").write_text('{"bos_token_id": 11, "sep_token_id": 5}')
    found = held(folder, 11)
    assert found["eos_token_id"] == 6 and found["seperator_token_id"] == 5 and "bos_token_id" not in found


def test_no_tokenizer(tmp_path: Path) -> None:
    assert held(tmp_path, 11) == {"general.architecture": "llama", "model": "none", "llama.vocab_size": 11}


@pytest.mark.parametrize(
    ("made", "size", "reason"),
    [
        (Tokenizer(models.Unigram([("a", 0.0)])), 11, "is Unigram, and of those"),
        (byte_level(ignore_merges=True), 11, "llama.cpp has no pre-tokenizer that cuts"),
        (byte_level(), 7, "has a token 7, and the model's vocab_size is 7"),
    ],
)
def test_what_llama_cpp_does_not_know_is_one_line(made: Any, size: int, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        held(saved(made, tmp_path), size)
