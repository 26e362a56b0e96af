"""Noise: copies that differ by noise, so that they specialize sooner (OLMoE tries a share of 0.5 and std 0.02)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.config.checks import NotNegative, Share
from moeify.methods.base import Method
from moeify.seeding import generator, normal


@dataclass(frozen=True)
class Noise(Method):
    """Experts are copies with N(0, std²) added to a random share of the entries of each weight.

    Attributes:
        share: Probability of each entry to be changed.
        std: Standard deviation of the noise.
    """

    share: Share = 0.5
    std: NotNegative = 0.02

    def changed(self, weight: Tensor, axis: int, seed: int, expert: str, which: str) -> Tensor:
        """Return the weight with noise on it."""
        name = f"{expert}.{which}"
        chosen = torch.rand(weight.shape, generator=generator(seed, f"{name}.share"), device="cpu") < self.share
        noise = (self.std * normal(weight.shape, seed, name)).masked_fill(~chosen, 0)
        return (weight.double() + noise.to(weight.device)).to(weight.dtype)
