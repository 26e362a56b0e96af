"""Wrong conversions, which a proof must refuse: small models that were converted and then damaged in one way each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import Output, convert_checkpoint, plan_checkpoint
from moeify.conversion.dense import DenseCheckpoint
from moeify.errors import MoeifyError
from moeify.proving.whole import verify_checkpoints

tf: Any = transformers
Tensors = dict[str, Tensor]
COPY, NOISE, CUT = MoEConfig(4, 2), MoEConfig(4, 2, method="noise"), MoEConfig(8, 4, granularity=2)
_SIZES = {"hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 3,
          "vocab_size": 101, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip
_GPT2 = {"n_layer": 3, "n_embd": 36, "n_inner": 64, "n_head": 3, "vocab_size": 101, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
EXPERT = "model.layers.1.{}.experts.{}.{}.weight"


@dataclass(frozen=True)
class Corruption:
    """One way to be wrong.

    Attributes:
        source: Model type of the dense model.
        config: How it is converted.
        damage: What is done to the tensors of the MoE, or to its folder, or to the config of the dense model.
        extra: Fields of the dense model's config.
        by_plan: Only the stored tensors show it: the model computes what it should, or promises nothing.
    """

    source: str
    config: MoEConfig
    damage: Callable[[Path], None]
    extra: tuple[tuple[str, object], ...] = ()
    by_plan: bool = False


def on_tensors(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    """Return a damage that changes the tensors of a file."""

    def damage(folder: Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[0]
        tensors = load_file(file)
        change(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})

    return damage


def on_config(**fields: object) -> Callable[[Path], None]:
    """Return a damage that changes fields of `config.json`."""

    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return damage


def _swap(first: str, second: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def _each(*changes: Callable[[Tensors], None]) -> Callable[[Path], None]:
    def change_all(tensors: Tensors) -> None:
        for change in changes:
            change(tensors)

    return on_tensors(change_all)


def _mixtral(expert: int, weight: str) -> str:
    return EXPERT.format("block_sparse_moe", expert, weight)


def _rows(name: str) -> Callable[[Path], None]:
    """Return a damage that turns the order of a tensor's rows around."""
    return on_tensors(lambda tensors: tensors.update({name: tensors[name].flip(0)}))


def _scale_one(name: str) -> Callable[[Path], None]:
    """Return a damage that changes the largest weight of a tensor by a thousandth."""

    def change(tensors: Tensors) -> None:
        flat = tensors[name].view(-1)
        flat[flat.abs().argmax()] *= 1.001

    return on_tensors(change)


def _add(name: str) -> Callable[[Path], None]:
    """Return a damage that adds a thousandth to all values of a tensor."""
    return on_tensors(lambda tensors: tensors.update({name: tensors[name] + 1e-3}))


def _lose_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


_ALL = range(4)
CORRUPTIONS: dict[str, Corruption] = {
    "swapped experts, with noise": Corruption(
        "llama", NOISE, _each(*(_swap(_mixtral(0, w), _mixtral(1, w)) for w in ("w1", "w2", "w3"))), by_plan=True),
    "gate and up permuted": Corruption(
        "llama", COPY, _each(*(_swap(_mixtral(expert, "w1"), _mixtral(expert, "w3")) for expert in _ALL))),
    "gate and up of one expert": Corruption("llama", COPY, _each(_swap(_mixtral(2, "w1"), _mixtral(2, "w3")))),
    "router order, with noise": Corruption(
        "llama", NOISE, _rows("model.layers.1.block_sparse_moe.gate.weight"), by_plan=True),
    "router order, of shards": Corruption(
        "qwen3", CUT, on_tensors(lambda tensors: tensors.update({"model.layers.1.mlp.gate.weight": tensors[
            "model.layers.1.mlp.gate.weight"][[0, 2, 1, 3, 4, 6, 5, 7]]}))),
    "router order, of copies": Corruption(
        "llama", COPY, _rows("model.layers.1.block_sparse_moe.gate.weight"), by_plan=True),
    "missing renormalization": Corruption("qwen3", COPY, on_config(norm_topk_prob=False)),
    "bias of an expert": Corruption("gpt2", COPY, _add("transformer.h.1.mlp.experts.down_proj_bias")),
    "bias of attention": Corruption("qwen2", COPY, _add("model.layers.1.self_attn.q_proj.bias")),
    "lost shard": Corruption("llama", COPY, _lose_shard),
    "one weight by 1e-3": Corruption("llama", COPY, _scale_one(_mixtral(2, "w2"))),
    "one weight by 1e-3, last layer": Corruption(
        "qwen3", COPY, _scale_one("model.layers.2.mlp.experts.1.gate_proj.weight")),
    "one weight of attention by 1e-3": Corruption("llama", COPY, _scale_one("model.layers.1.self_attn.v_proj.weight")),
    "permuted attention": Corruption("llama", COPY, _rows("model.layers.1.self_attn.q_proj.weight")),
    "another epsilon": Corruption("llama", COPY, on_config(rms_norm_eps=1e-5)),
    "another rotation": Corruption(
        "llama", COPY, on_config(rope_parameters={"rope_theta": 5e5, "rope_type": "default"})),
    "sliding window lost": Corruption(
        "mistral", COPY, on_config(sliding_window=None), extra=(("sliding_window", 4),)),
    "biases of attention lost": Corruption("llama", COPY, lambda _: None, extra=(("attention_bias", True),)),
    "biases of FFNs lost": Corruption("llama", COPY, lambda _: None, extra=(("mlp_bias", True),)),
}  # fmt: skip
"""Every one must be refused, by the numbers where it can be seen in them."""


def build(source: str, **extra: object) -> Any:
    """Return a small dense model whose outputs depend on every weight."""
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(source, **{**(_GPT2 if source == "gpt2" else _SIZES), **extra})
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        spread = 0.15 if parameter.dim() > 1 else 0.1
        parameter.data.copy_(parameter.data.mean() * (parameter.dim() == 1) + torch.randn(parameter.shape) * spread)
    return model


def convert(model: Any, folder: Path, config: MoEConfig, shard_size: int = 10**9) -> tuple[Path, Path]:
    """Save a dense model and convert its checkpoint."""
    dense, moe = folder / "dense", folder / "moe"
    model.save_pretrained(dense)
    with open_source(dense) as source:
        opened = DenseCheckpoint(source)
        convert_checkpoint(opened, plan_checkpoint(opened, config), Output(moe, shard_size))
    return dense, moe


def make(name: str, folder: Path) -> tuple[Path, Path]:
    """Write a dense model and the damaged MoE of one corruption; what a pair loses, only the dense model has."""
    corruption = CORRUPTIONS[name]
    lost = {field: value for field, value in corruption.extra if str(field).endswith("_bias")}
    kept = {field: value for field, value in corruption.extra if field not in lost}
    model = build(corruption.source, **kept)
    dense, moe = convert(model, folder, corruption.config, 10**5 if corruption.damage is _lose_shard else 10**9)
    corruption.damage(moe)
    if lost:
        richer = build(corruption.source, **lost)
        richer.load_state_dict(model.state_dict(), strict=False)
        richer.save_pretrained(folder / "richer")
        dense = folder / "richer"
    return dense, moe


def refusal(dense: Path, moe: Path) -> str | None:
    """Return why a pair is refused, None if it passes."""
    try:
        report = verify_checkpoints(dense, moe)
    except MoeifyError as error:
        return str(error)
    return None if report.passed else report.failure()
