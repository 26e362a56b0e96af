"""The values that a router starts with, by name: the same for a module in memory and for a checkpoint on disk.

Shape legend: E experts, H hidden, V vocabulary, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.config import MoEConfig
from moeify.routing.routers import hash_table, router_init


@dataclass(frozen=True)
class StartValue:
    """One tensor of a router.

    Attributes:
        shape: Its shape.
        dtype: Its own dtype, as safetensors spells it; None takes that of the weights that the layer replaces.
        build: Computes it, on the CPU.
    """

    shape: tuple[int, ...]
    dtype: str | None
    build: Callable[[], Tensor]


def router_start(config: MoEConfig, hidden: int, path: str) -> dict[str, StartValue]:
    """Return a router's tensors in the order of its state dict, by their names under `router.`.

    Args:
        config: The settings.
        hidden: H.
        path: The layer's place in the model; random values depend on it and the seed alone.
    """
    square = (config.experts, hidden)

    def drawn(name: str, rows: int) -> StartValue:
        """Rows for each expert: the same for the experts of a group, which hold the shards of one copy of the FFN."""

        def build() -> Tensor:
            groups = config.experts // config.granularity
            init = router_init((groups * rows, hidden), config.seed, f"{path}.router.{name}")
            return init.view(groups, rows, hidden).repeat_interleave(config.granularity, dim=0).flatten(0, 1)

        return StartValue((config.experts * rows, hidden), None, build)

    match config.router:
        case "noisy_topk":
            # The paper starts the noise at zero weight, where its standard deviation is log 2 for every token.
            noise = StartValue(square, None, lambda: torch.zeros(square))
            return {"weight": drawn("weight", 1), "noise_weight": noise}
        case "sigmoid":
            bias = StartValue((config.experts,), "F32", lambda: torch.zeros(config.experts))
            return {"weight": drawn("weight", 1), "selection_bias": bias}
        case "hash":
            vocabulary = config.vocabulary or 0
            name = f"{path}.router.table"
            build = lambda: hash_table(vocabulary, config.experts, config.seed, name)  # noqa: E731
            return {"table": StartValue((vocabulary,), "I64", build)}
        case "soft":
            scale = StartValue((), None, lambda: torch.ones(()))
            return {"slots": drawn("slots", config.slots), "scale": scale}
        case _:
            return {"weight": drawn("weight", 1)}
