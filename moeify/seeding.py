"""Random numbers that depend on a seed and a name only, not on order, sharding, device or the number of workers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, name: str) -> torch.Generator:
    """Return a generator on the CPU whose numbers depend on seed and name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big"))


def normal(shape: Sequence[int], seed: int, name: str) -> Tensor:
    """Return float64 draws of N(0, 1), on the CPU; torch's float32 sampler rounds differently on other vector units."""
    return torch.randn(tuple(shape), generator=generator(seed, name), dtype=torch.float64, device="cpu")
