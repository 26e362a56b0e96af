"""Copy: each expert is a part of the dense FFN as it is (sparse upcycling, Komatsuzaki et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moeify.methods.base import Method


@dataclass(frozen=True)
class Copy(Method):
    """Experts are copies."""

    exact = True

    def changed(self, weight: Tensor, axis: int, seed: int, expert: str, which: str) -> Tensor:
        """Return the weight itself."""
        return weight
