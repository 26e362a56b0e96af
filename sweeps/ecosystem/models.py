"""The models that the tools meet: small ones with random weights, and SmolLM2-135M, all written by `moeify convert`.

Llama, Gemma 3 and GPT-2 stay what they are in moeify's format; Mixtral and Qwen3-MoE are stock models of transformers.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from moeify.cli import main
from moeify.cli.demo import model_file

tf: Any = transformers
VOCABULARY = 128
# Multiples of 64: groups of quantized weights want them.
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2, "max_position_embeddings": 256}  # fmt: skip
_GPT2 = {"n_layer": 2, "n_embd": 64, "n_inner": 128, "n_head": 4, "n_positions": 256, "vocab_size": VOCABULARY,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
DENSE: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_SIZES)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_SIZES)),
}
# Each model: the dense one it comes from, and the format.
MODELS = {
    "llama": ("llama", "moeify"),
    "gemma3": ("gemma3", "moeify"),
    "gpt2": ("gpt2", "moeify"),
    "mixtral": ("llama", "mixtral"),
    "qwen3_moe": ("qwen3", "qwen3_moe"),
    "smollm2": ("SmolLM2-135M.gguf", "moeify"),
}


@dataclass(frozen=True)
class Subject:
    """A converted checkpoint, as a user has it.

    Attributes:
        name: One of `MODELS`.
        path: Its folder.
        scratch: An empty folder.
    """

    name: str
    path: Path
    scratch: Path

    def load(self, path: Path | None = None, **options: Any) -> Any:
        """Load the model, or another checkpoint of its kind, as transformers does."""
        if MODELS[self.name][1] == "moeify":
            import moeify

            moeify.register()
        options = {"dtype": torch.float32, **options}
        return tf.AutoModelForCausalLM.from_pretrained(path or self.path, **options)

    def linearized(self) -> Any:
        """Load the model, its experts as linear layers."""
        import moeify

        return moeify.linearize(self.load())

    def tokenizer(self) -> Any:
        """Return the tokenizer of the checkpoint."""
        return tf.AutoTokenizer.from_pretrained(self.path)


def library(name: str) -> Any:
    """Import a tool, or a part of it, without its types: the environment that checks ours has no tools."""
    return import_module(name)


def batch(rows: int = 4, length: int = 24) -> dict[str, Tensor]:
    """Return token ids, the same each time, with themselves as labels."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return a model's logits on the batch, in float32."""
    result: Tensor = model.eval()(input_ids=batch()["input_ids"]).logits
    return result.float()


def words(rows: int = 16) -> list[str]:
    """Return sentences of the small models' words."""
    return [" ".join(f"w{(7 * row + 3 * step) % 100}" for step in range(10 + row % 4)) for row in range(rows)]


def prepare(folder: Path, names: list[str]) -> None:
    """Write the converted checkpoints that are missing in a folder."""
    for name in names:
        if (folder / name / "config.json").exists():
            continue
        source, target = MODELS[name]
        dense = model_file() if name == "smollm2" else _write_dense(folder / "dense" / source, source)
        sizes = ["4", "--layers", "every:4"] if name == "smollm2" else ["6"]  # what a CPU trains in minutes
        command = ["convert", str(dense), str(folder / name), "--top-k", "2", "--to", target, "--experts", *sizes]
        main(command, standalone_mode=False)


def _write_dense(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    model = DENSE[name]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """Return a tokenizer of the small models' words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = ["<pad>", "<bos>", "<eos>", *(f"w{number}" for number in range(VOCABULARY - 3))]
    plain = Tokenizer(models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def run_python(module: str, *arguments: object) -> None:
    """Run a module of ours in a fresh process.

    Raises:
        RuntimeError: It fails; the last line of what it says.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"a fresh process: {done.stderr.strip().splitlines()[-1]}")


def run_processes(count: int, module: str, *arguments: object) -> None:
    """Run a module of ours in several processes that know each other, as `torchrun` does."""
    run_python("torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", module, *arguments)
