"""Attention weights in another form: fused projections apart, rotary dimensions in the other of two orders."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moeify.families.base import Config, Fields, Rewrite, head_dim, kv_heads

_ATTENTION = r"model\.layers\.\d+\.self_attn"


def _heads(name: str, config: Config) -> int:
    return int(config["num_attention_heads"]) if name == "q" else kv_heads(config)


def _rotated(config: Config) -> int:
    """Return how many dimensions of a head are rotated."""
    share = (config.get("rope_parameters") or {}).get("partial_rotary_factor") or 1.0
    return int(head_dim(config) * share)


def _reordered(name: str, *, to_pairs: bool) -> Callable[[Tensor, Config], Tensor]:
    """Return what reorders the rotated rows of each head: two halves that rotate together, or pairs of neighbors."""

    def reorder(tensor: Tensor, config: Config) -> Tensor:
        heads = tensor.reshape(_heads(name, config), head_dim(config), *tensor.shape[1:])
        size = _rotated(config)
        turned, rest = heads[:, :size], heads[:, size:]
        shape = (2, size // 2) if to_pairs else (size // 2, 2)
        turned = turned.reshape(len(turned), *shape, *tensor.shape[1:]).transpose(1, 2).flatten(1, 2)
        return torch.cat([turned, rest], 1).flatten(0, 1)

    return reorder


def reordered(path: str = _ATTENTION, *, to_pairs: bool) -> tuple[Rewrite, ...]:
    """Return what reorders the rotated rows of q and k at a path, a regular expression."""
    return tuple(
        Rewrite(rf"({path}\.{name}_proj\.(?:weight|bias))", {r"\1": _reordered(name, to_pairs=to_pairs)})
        for name in ("q", "k")
    )


# Rows of q and k of models that rotate halves (Llama) for a format that rotates neighbors (ERNIE, GLM), and back.
HALVES_TO_PAIRS, PAIRS_TO_HALVES = reordered(to_pairs=True), reordered(to_pairs=False)


def _rows(name: str) -> Callable[[Tensor, Config], Tensor]:
    def cut(tensor: Tensor, config: Config) -> Tensor:
        sizes = [_heads(part, config) * head_dim(config) for part in "qkv"]
        return torch.split(tensor, sizes)["qkv".index(name)]

    return cut


SPLIT_QKV = Rewrite(rf"({_ATTENTION})\.qkv_proj\.weight", {rf"\1.{name}_proj.weight": _rows(name) for name in "qkv"})
SPLIT_GATE_UP = Rewrite(  # of FFNs that stay dense
    r"(model\.layers\.\d+\.mlp)\.gate_up_proj\.weight",
    {
        r"\1.gate_proj.weight": lambda tensor, config: tensor.chunk(2)[0],
        r"\1.up_proj.weight": lambda tensor, config: tensor.chunk(2)[1],
    },
)


def zero_biases(*names: str) -> Mapping[str, Callable[[Config], Tensor]]:
    """Return zeros for the biases of attention projections that the dense model does not have."""

    def zeros(name: str) -> Callable[[Config], Tensor]:
        if name == "o":
            return lambda config: torch.zeros(config["hidden_size"])
        return lambda config: torch.zeros(_heads(name, config) * head_dim(config))

    return {f"model.layers.{{layer}}.self_attn.{name}_proj.bias": zeros(name) for name in names}


def no_sinks(config: Config) -> Tensor:
    """Return attention sinks that take nothing: exp(-8192) is zero, and the number is one in every dtype."""
    return torch.full((int(config["num_attention_heads"]),), -8192.0)


def scaled_as_usual(config: Config) -> Fields:
    """Return Granite's multipliers for a model that has none."""
    return {
        "attention_multiplier": head_dim(config) ** -0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def whole_rotary(config: Config) -> Fields:
    """Return rotary settings that say that whole heads are rotated, where a format takes another share for granted."""
    return {"rope_parameters": {"partial_rotary_factor": 1.0, **(config.get("rope_parameters") or {})}}
