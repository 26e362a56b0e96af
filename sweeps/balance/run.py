"""A model of `moeify convert`, trained in a script, and how its experts are used in the end."""

from __future__ import annotations

import contextlib
import io
import pydoc_data.topics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import moeify
from moeify.cli import main as moeify_command
from sweeps.balance.scripts import LENGTH, ROWS, SCRIPTS, STEPS

tf: Any = transformers
EXPERTS, TOP_K = 8, 2
FEWEST, MOST = 1 / 4, 4.0  # of an expert's fair share
SEEN = 64  # rows that are not trained on: what the experts are used for in the end
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": LENGTH,
          "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
_GPT2 = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": LENGTH, "vocab_size": 256, "bos_token_id": None,
         "eos_token_id": None}  # fmt: skip
DENSE: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT2)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_SIZES)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**_SIZES)),
}
# Each model: the dense one, the format, and more options of `moeify convert`.
MODELS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "llama": ("llama", "moeify", ()),
    "gpt2": ("gpt2", "moeify", ()),
    "llama, attach_losses=False": ("llama", "moeify", ("--set", "attach_losses=false")),
    "mixtral": ("llama", "mixtral", ()),
    "qwen3_moe": ("qwen3", "qwen3_moe", ()),
    "flex_olmo": ("olmo2", "flex_olmo", ()),
}
NATIVE = tuple(name for name, (_, target, _) in MODELS.items() if target != "moeify")
ASKED = "output_router_logits=True"


@dataclass(frozen=True)
class Row:
    """How a run ended.

    Attributes:
        script: One of `SCRIPTS`.
        model: One of `MODELS`.
        asked: What the user set in the config, if anything.
        accumulated: Micro-batches of a step.
        first: The loss before the first step.
        last: The loss after the last, on the same rows that nobody trained on.
        least: The share of choices of the idlest expert of a layer, by its fair share.
        most: That of the busiest.
        warned: How often moeify warned in training that nothing balances the experts.
        told: What the conversion had said of it.
    """

    script: str
    model: str
    asked: str
    accumulated: int
    first: float
    last: float
    least: float
    most: float
    warned: int
    told: str

    @property
    def balanced(self) -> bool:
        """Whether every expert is in use."""
        return self.least >= FEWEST and self.most <= MOST

    @property
    def right(self) -> bool:
        """Whether it is, or its user knows why not; and heard of it once, not at each step."""
        return self.warned + bool(self.told) <= 1 and (self.balanced or self.warned + bool(self.told) == 1)


@dataclass(frozen=True)
class Text:
    """Bytes of Python's help, in rows of token ids."""

    rows: Tensor

    @classmethod
    def of_help(cls) -> Text:
        """Take as much as is needed."""
        text = "\n".join(pydoc_data.topics.topics.values()).encode()
        count = STEPS * ROWS + SEEN
        return cls(torch.frombuffer(bytearray(text[: count * LENGTH]), dtype=torch.uint8).long().view(count, LENGTH))

    @property
    def trained(self) -> Tensor:
        """Rows for training."""
        return self.rows[:-SEEN]

    @property
    def seen(self) -> Tensor:
        """Rows to look at the experts with."""
        return self.rows[-SEEN:]


def write_models(folder: Path) -> dict[str, str]:
    """Write every model; return what `moeify convert` said about balance, by model."""
    said = {}
    for name, (source, target, options) in MODELS.items():
        torch.manual_seed(0)
        DENSE[source]().save_pretrained(folder / "dense" / source)
        command = ["convert", str(folder / "dense" / source), str(folder / name), "--experts", str(EXPERTS),
                   "--top-k", str(TOP_K), "--to", target, *options]  # fmt: skip
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            moeify_command(command, standalone_mode=False)
        lines = stderr.getvalue().splitlines()
        said[name] = next((line for line in lines if "balances" in line), "")
    return said


def measure(script: str, model: str, asked: str, accumulated: int, folder: Path, told: str) -> Row:
    """Train, and look at the experts on rows that were not trained on."""
    moeify.register()
    torch.manual_seed(1)
    trained: Any = tf.AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float32)
    trained.config.output_router_logits = bool(asked)
    text = Text.of_help()
    first = _loss(trained, text.seen)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        SCRIPTS[script](trained, text.trained, accumulated, Path(scratch))
    warned = sum("nothing balances" in str(warning.message) for warning in caught)
    with moeify_tracking(trained):
        last = _loss(trained, text.seen)
        shares = [share * EXPERTS for stats in moeify.routing_stats(trained).values() for share in stats.load]
    first, last, least, most = (round(value, 3) for value in (first, last, min(shares), max(shares)))
    return Row(script, model, asked, accumulated, first, last, least, most, warned, told)


@contextlib.contextmanager
def moeify_tracking(model: Any) -> Iterator[None]:
    """Look at the layers of transformers too."""
    tracking = moeify.track_routing(model)
    try:
        yield
    finally:
        tracking.remove()


@torch.no_grad()
def _loss(model: Any, ids: Tensor) -> float:
    return float(F.cross_entropy(model.eval()(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
