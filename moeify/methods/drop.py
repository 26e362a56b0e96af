"""Drop: copies that lose a share of their neurons (Drop-Upcycling, Nakamura et al. 2025, arXiv:2502.19261)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.config.checks import Share
from moeify.methods.base import Method
from moeify.seeding import generator, normal


@dataclass(frozen=True)
class Drop(Method):
    """Experts are copies in which a share of the neurons is drawn anew.

    As in the paper the up, gate and down projections of an expert lose the same neurons, which are drawn from a normal
    distribution with the mean and the standard deviation of what they replace; biases, which the paper's models lack,
    stay.

    Attributes:
        share: Share of the neurons.
    """

    share: Share = 0.5

    def changed(self, weight: Tensor, axis: int, seed: int, expert: str, which: str) -> Tensor:
        """Return the weight with some of its rows, or columns of a down projection, drawn anew."""
        neurons = dropped_neurons(weight.shape[axis], self.share, seed, f"{expert}.neurons")
        if not len(neurons):
            return weight
        old = weight.detach().cpu().index_select(axis, neurons).double()  # a mean has the same bits on every CPU
        new = old.mean() + old.std(correction=0) * normal(old.shape, seed, f"{expert}.{which}")
        return weight.index_copy(axis, neurons.to(weight.device), new.to(weight))


def dropped_neurons(neurons: int, share: float, seed: int, name: str) -> Tensor:
    """Return which neurons an expert draws anew: round(share * neurons) of them, int64 on the CPU."""
    return torch.randperm(neurons, generator=generator(seed, name), device="cpu")[: round(share * neurons)]
