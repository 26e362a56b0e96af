"""What the recipes share: a small chat of arithmetic, a tokenizer, a model (tiny, or a folder of your own)."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import moeify
from moeify import MoEConfig

CONFIG = MoEConfig(experts=4, top_k=2)
LENGTH = 32  # tokens of a row, at most
STEPS, STEPS_OF_A_REAL_MODEL = 60, 8  # a CPU takes minutes for either


def options(description: str | None) -> argparse.Namespace:
    """Read the options that every recipe has, and seed torch."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="a dense model folder or hub id, such as HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--layers", default="all", help="which become MoE layers, as for moeify convert: every:4")
    parser.add_argument("--steps", type=int, help=f"{STEPS}, or {STEPS_OF_A_REAL_MODEL} with --model")
    parser.add_argument("--out", default="out", help="where the result goes")
    parser.add_argument("--fast", action="store_true", help="a few steps, to see that it runs")
    chosen = parser.parse_args()
    usual = STEPS_OF_A_REAL_MODEL if chosen.model else STEPS
    chosen.steps = chosen.steps or (3 if chosen.fast else usual)
    torch.manual_seed(0)
    return chosen


def dense_model(name: str | None) -> tuple[Any, Any]:
    """Load a model and its tokenizer; without a name make a tiny one that reads bytes."""
    if name:
        return moeify.load(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    sizes: Any = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids: Any = {"vocab_size": 259, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
    return LlamaForCausalLM(LlamaConfig(**sizes, **ids)), _bytes_tokenizer()


def texts(count: int, start: int = 0) -> list[str]:
    """Make questions and answers; rows of other starts are other rows."""
    numbers = range(start, start + count)
    return [f"Q: {7 * i % 90} + {13 * i % 90} = A: {7 * i % 90 + 13 * i % 90}" for i in numbers]


def batch(tokenizer: Any, rows: list[str]) -> dict[str, Tensor]:
    """Return rows as what the model is called with; padding is no label and counts in no balancing loss."""
    found: Any = tokenizer(rows, return_tensors="pt", padding=True, truncation=True, max_length=LENGTH)
    ids, mask = found["input_ids"], found["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@torch.no_grad()
def evaluate(model: nn.Module, tokenizer: Any) -> float:
    """Return the loss on rows that no recipe trains on."""
    was = model.training
    loss = float(model.eval()(**batch(tokenizer, texts(32, start=10_000))).loss)
    model.train(was)
    return loss


def _bytes_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.WordLevel({**letters, "<pad>": 256, "<bos>": 257, "<eos>": 258}, unk_token="<pad>"))
    split: Any = pre_tokenizers.Sequence
    byte_level, single = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split("", "isolated")
    words.pre_tokenizer = split([byte_level, single])
    words.decoder = decoders.ByteLevel()
    special: Any = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=words, **special)
