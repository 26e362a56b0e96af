"""What the formats of models with state-space layers share: kinds of layers by the hub's words, and Mamba 2 in GGUF."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from moeify.families.base import Config, Rewrite, as_it_is, kv_heads

_HUB_WORDS = {"linear_attention": "mamba", "full_attention": "attention"}
ENDLESS = 2**20  # llama.cpp's word for the context of a model without rotary positions


def hub_kinds(kinds: Iterable[str]) -> list[str]:
    """Return kinds of layers by the hub's words, which engines read; transformers 5 has others, and reads both."""
    return [_HUB_WORDS.get(kind, kind) for kind in kinds]


def decay(tensor: Tensor) -> Tensor:
    """Return what llama.cpp has in place of the logarithm of a state's decay."""
    return -tensor.float().exp()


def attends(config: Config, kinds: Iterable[str]) -> list[int]:
    """Return the number of key heads of each layer, 0 for one that does not attend, as GGUF has them."""
    return [kv_heads(config) if kind == "attention" else 0 for kind in hub_kinds(kinds)]


def mamba_rewrites(model: str, mixer: str) -> tuple[Rewrite, ...]:
    """Return what GGUF stores of the state spaces of a model, by the names of the model and of its mixers."""
    path = rf"({model}\.layers\.\d+\.{mixer})"
    return (
        Rewrite(rf"{path}\.A_log", {r"\1.A_log": lambda tensor, config: decay(tensor).unsqueeze(-1)}),
        Rewrite(rf"{path}\.D", {r"\1.D": lambda tensor, config: tensor.unsqueeze(-1)}),
        Rewrite(rf"{path}\.dt_bias", {r"\1.dt_proj.bias": as_it_is}),
        Rewrite(rf"{path}\.conv1d\.weight", {r"\1.conv1d.weight": lambda tensor, config: tensor.squeeze(1)}),
        Rewrite(
            rf"{path}\.norm\.weight",
            {r"\1.norm.weight": lambda tensor, config: tensor.reshape(config["mamba_n_groups"], -1)},
        ),
    )
