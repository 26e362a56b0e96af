"""What the pages talk about, tiny: a dense model, what becomes of it, a text, and the log of a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import moeify
from moeify.training.run_log import RUN_FILE, RunLog

tf: Any = transformers
# Names of a dense model in the pages.
DENSE = ("my-dense-model", "my-dense", "SRC", "DENSE", "my-dense-math", "my-dense-code")
MOE = ("my-moe", "FOLDER", "my-moe-math", "my-moe-code")  # and of a converted one
BYTES = 256
_IDS = {"pad_token_id": BYTES, "bos_token_id": BYTES + 1, "eos_token_id": BYTES + 2, "vocab_size": BYTES + 4}
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
          "num_key_value_heads": 2}  # fmt: skip


def write_models(folder: Path) -> None:
    """Write everything, under all its names."""
    torch.manual_seed(0)
    model, tokenizer = tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES, **_IDS)), bytes_tokenizer()
    for names in (DENSE, MOE):
        if names == MOE:
            moeify.convert(model, moeify.MoEConfig(8, 2))
        for name in names:
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    (folder / "book.txt").write_text("Once upon a time there were eight experts. " * 20)
    model(input_ids=torch.arange(32)[None])
    log = RunLog(folder / "output" / RUN_FILE, goes_on=False)
    for step in (1, 2):
        log.add(step, 5.0 / step, moeify.routing_stats(model))
    shutil.copy(folder / "output" / RUN_FILE, folder)


def bytes_tokenizer() -> Any:
    """A tokenizer with a token for each byte, which cuts texts as GPT-2's does."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made: Any = Tokenizer(models.BPE({**letters, "<pad>": BYTES, "<s>": BYTES + 1, "</s>": BYTES + 2}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, **special)
