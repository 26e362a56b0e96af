"""Random numbers of a layer that differ between ranks, though all ranks were seeded alike."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import nn


class NoiseOfRank:
    """Draws a seed where all ranks draw the same one, adds the rank, and lets a layer draw from there.

    Trainers seed every rank alike, so that routers with noise would draw the same noise for the tokens of every rank.
    Activation checkpointing sets the generator back before it runs a layer again: it draws the same seed then.
    """

    def __init__(self) -> None:
        self._fork: AbstractContextManager[None] | None = None

    def attach(self, layer: nn.Module) -> None:
        """Do so in each training forward pass of a layer."""
        layer.register_forward_pre_hook(self._enter)
        layer.register_forward_hook(self._leave, always_call=True)

    def _enter(self, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not layer.training:
            return
        seed = int(torch.randint(2**62, (), device="cpu"))
        device = args[0].device
        self._fork = torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=_kind(device))
        self._fork.__enter__()
        torch.manual_seed(seed + dist.get_rank())

    def _leave(self, layer: nn.Module, args: tuple[object, ...], output: object) -> None:
        if self._fork is not None:
            fork, self._fork = self._fork, None
            fork.__exit__(None, None, None)


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type  # without devices the kind does not matter
