"""The small whole inputs that cases damage: each is made once in a process, when a case first asks for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cache, partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
import transformers
from safetensors.torch import load_file

from moeify.config import MoEConfig
from moeify.training.run_log import RunLog
from moeify.training.stats import LayerStats
from tests.fuzz.damage.gguf import small_gguf
from tests.fuzz.quantized import adapt, quantize
from tests.moeify import tiny
from tests.moeify.parts import halves, write_parts
from tests.moeify.runtime.decoder import WORD_LEVEL, decoder

tf: Any = transformers
HIDDEN, INTERMEDIATE, LAYERS, WORDS = 16, 24, 3, 32  # the third layer is not a part of the proof's slice


def llama(folder: Path, **options: Any) -> None:
    """Three layers, with a tokenizer and the files that stand beside a model."""
    config = tf.LlamaConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
                            num_attention_heads=2, num_key_value_heads=1, vocab_size=WORDS, max_position_embeddings=64,
                            pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)  # fmt: skip
    _save(tf.LlamaForCausalLM(config), folder, **options)
    words = json.loads(WORD_LEVEL % ", ".join(f'"w{i}": {i}' for i in range(WORDS)))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], **words}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"})
    )


def gpt2(folder: Path) -> None:
    """Transposed projections with biases."""
    config = tf.GPT2Config(n_layer=LAYERS, n_embd=HIDDEN, n_inner=INTERMEDIATE, n_head=2, vocab_size=WORDS,
                           n_positions=64, bos_token_id=1, eos_token_id=2)  # fmt: skip
    _save(tf.GPT2LMHeadModel(config), folder)


def _save(model: Any, folder: Path, **options: Any) -> None:
    torch.manual_seed(0)
    tiny.draw(model, std=0.2).save_pretrained(folder, **options)


def _tiny(name: str, folder: Path) -> None:
    tiny.save(tiny.build(name), folder)


def _pickle(folder: Path) -> None:
    llama(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _parts(folder: Path) -> None:
    llama(folder)
    write_parts(folder, halves(load_file(folder / "model.safetensors")))
    (folder / "model.safetensors").unlink()


def _quantized(name: str, folder: Path) -> None:
    llama(folder)
    quantize(folder, name)


def _adapter(folder: Path) -> None:
    adapt(source("llama"), folder)


def _converted(folder: Path, target: str) -> None:
    tiny.convert_files(source("llama"), folder, MoEConfig(3, 2), target=target)


def _onnx(path: Path) -> None:
    onnx.save(decoder(), path)


def _run(path: Path) -> None:
    log = RunLog(path, goes_on=False)
    for step in range(3):
        stats = {f"layers.{n}": LayerStats(9, 18, (0.5, 0.25, 0.25), 0.5, 1, {"z": 0.1}, 2.0) for n in range(2)}
        log.add(step, 3.0 - step, stats)


_MAKERS: dict[str, Callable[[Path], None]] = {
    "llama": llama,
    "gpt2": gpt2,
    **{name: partial(_tiny, name) for name in ("bert", "t5", "phi3")},
    "sharded": lambda folder: llama(folder, max_shard_size="6KB"),
    "pickle": _pickle,
    "parts": _parts,
    **{name: partial(_quantized, name) for name in ("fp8", "gptq", "nf4", "packed")},
    "adapter": _adapter,
    "moeify": lambda folder: _converted(folder, "moeify"),
    "mixtral": lambda folder: _converted(folder, "mixtral"),
    "llama.gguf": small_gguf,
    "decoder.onnx": _onnx,
    "run.jsonl": _run,
}


@cache
def _room() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="fuzz-sources-")


@cache
def source(name: str) -> Path:
    """Return the whole input of a name."""
    path = Path(_room().name) / name
    with redirect_stderr(StringIO()):  # progress bars
        _MAKERS[name](path)
    return path


def copy_of(name: str, work: Path) -> Path:
    """Copy an input into the folder of a case, as `src` with the suffix of its kind."""
    whole = source(name)
    path = work / f"src{whole.suffix}"
    (shutil.copytree if whole.is_dir() else shutil.copyfile)(whole, path)
    return path
