"""Changes that make copies differ from each other, so that they specialise sooner; the model is no longer exact."""

from __future__ import annotations

import torch
from torch import Tensor

from moeify.seeding import generator, normal


def noisy(weight: Tensor, share: float, std: float, seed: int, name: str) -> Tensor:
    """Return a weight with N(0, std²) added to a random share of its entries (noise upcycling; OLMoE tries 0.5, 0.02).

    Args:
        weight: Any shape, any float dtype.
        share: Probability of each entry to be changed.
        std: Standard deviation of the noise.
        seed: Any integer.
        name: The weight's name; the numbers depend on seed and name alone.
    """
    chosen = torch.rand(weight.shape, generator=generator(seed, f"{name}.share"), device="cpu") < share
    noise = (std * normal(weight.shape, seed, name)).masked_fill(~chosen, 0)
    return (weight.double() + noise.to(weight.device)).to(weight.dtype)


def dropped_neurons(width: int, share: float, seed: int, name: str) -> Tensor:
    """Return which neurons an expert draws anew: round(share * width) of them, int64 on the CPU."""
    return torch.randperm(width, generator=generator(seed, name), device="cpu")[: round(share * width)]


def redrawn(weight: Tensor, neurons: Tensor, axis: int, seed: int, name: str) -> Tensor:
    """Return a weight whose rows or columns for some neurons are drawn anew (Drop-Upcycling, Nakamura et al. 2025).

    They are drawn from a normal distribution with the mean and the standard deviation of what they replace. As in the
    paper (arXiv:2502.19261) an expert's projections lose the same neurons; biases, which its models lack, stay.

    Args:
        weight: (out, in), any float dtype.
        neurons: Indices along `axis`, int64 on the CPU.
        axis: 0 for a projection into the intermediate width, 1 for the projection back.
        seed: Any integer.
        name: The weight's name; the numbers depend on seed and name alone.
    """
    if not len(neurons):
        return weight
    old = weight.detach().cpu().index_select(axis, neurons).double()  # on the CPU a mean has the same bits everywhere
    new = old.mean() + old.std(correction=0) * normal(old.shape, seed, name)
    return weight.index_copy(axis, neurons.to(weight.device), new.to(weight))
