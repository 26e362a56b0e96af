"""Gemma as a Llama: its norms multiply by 1 + weight, and its embeddings by the root of the hidden size."""

from __future__ import annotations

from torch import Tensor

from moeify.families.base import Config, Fields, Rewrite

ACTIVATION = "gelu_tanh"
ONLY = "transformers alone reads the activation from the config: every other engine computes silu there"
NORMS = Rewrite(
    r"(model\.(?:layers\.\d+\.(?:input|post_attention)_layernorm|norm)\.weight)",
    {r"\1": lambda tensor, config: 1 + tensor},
    wide=True,
)


def gelu(config: Config) -> Fields:
    """Return the config field for the activation."""
    return {"hidden_act": "gelu_pytorch_tanh"}


def embedding_scale(config: Config) -> float:
    """Return what embeddings are multiplied by."""
    return float(config["hidden_size"] ** 0.5)


def _scaled(tensor: Tensor, config: Config) -> Tensor:
    return tensor * embedding_scale(config)


EMBEDDING = Rewrite(r"(model\.embed_tokens\.weight)", {r"\1": _scaled}, wide=True)
