"""What each expert holds of the dense FFN, and by what it is multiplied so that the sum stays what it was.

Copies (sparse upcycling, Komatsuzaki et al. 2022, arXiv:2212.05055): with weights that sum to 1 the layer computes
Σ_k w_k·FFN(x) = FFN(x), whatever the router: exact at step 0.

Granularity G (He et al. 2024, arXiv:2410.07524): the FFN is cut along its intermediate width into G shards, whose
outputs add up to the FFN's; expert e holds shard e mod G. Routers start with equal rows for the G experts of a group,
so whole groups are chosen, each with weights of w/G: multiplying the projections back by G makes the sum exact. (The
paper multiplies all three projections of a GLU by a cube root, which is not: silu(c·g) ≠ c·silu(g).)

Shared experts see every token: shared expert n holds shard n mod G. A shard that n of them hold is computed n + 1
times, once of it by the routed experts: each time counts 1/(n + 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.config import MoEConfig
from moeify.config.contracts import MethodChoice
from moeify.methods.copy import Copy


@dataclass(frozen=True)
class DenseFFN:
    """The weights of one FFN, each stored (out, in).

    Attributes:
        up_JH: Up projections, gate rows then up rows.
        down_HI: Down projection.
        up_bias_J: Bias of the up projections, or None.
        down_bias_H: Bias of the down projection, or None.
    """

    up_JH: Tensor
    down_HI: Tensor
    up_bias_J: Tensor | None
    down_bias_H: Tensor | None


@dataclass(frozen=True)
class Part:
    """One expert's part of an FFN.

    Attributes:
        name: The expert's name in the model; its random numbers depend on this and the seed.
        config: The settings.
        method: What makes it differ from the FFN.
        shard: Which shard of the intermediate width it holds, of `config.granularity`.
        down_scale: Multiplies the projection back.
        bias_scale: Multiplies the bias of the projection back.
    """

    name: str
    config: MoEConfig
    method: MethodChoice
    shard: int
    down_scale: float
    bias_scale: float

    def ups(self, up_JH: Tensor, widths: Sequence[int]) -> Tensor:
        """Return the expert's first weight, or bias, or moments of either.

        Args:
            up_JH: (J, H) or (J,): the FFN's projections into the intermediate width, one after the other.
            widths: Rows of each of them.
        """
        return torch.cat([self.up(rows, i) for i, rows in enumerate(torch.split(up_JH, list(widths)))])

    def up(self, up_IH: Tensor, index: int) -> Tensor:
        """Return the expert's rows of one projection into the intermediate width, or of its bias (I,)."""
        cut = self._cut(up_IH, 0)
        return cut if cut.dim() == 1 else self._changed(cut, f"up{index}", 0)

    def down(self, down_HI: Tensor) -> Tensor:
        """Return the expert's projection back (H, F), of the FFN's (H, I)."""
        return _scaled(self._changed(self._cut(down_HI, 1), "down", 1), self.down_scale)

    def down_bias(self, bias_H: Tensor) -> Tensor:
        """Return the bias of the projection back."""
        return _scaled(bias_H, self.bias_scale)

    def moments(self) -> Part:
        """Return the same part for moments of the weights, which are cut and neither changed nor scaled."""
        return Part(self.name, self.config, Copy(), self.shard, 1.0, 1.0)

    def _cut(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.chunk(self.config.granularity, axis)[self.shard]

    def _changed(self, weight: Tensor, which: str, axis: int) -> Tensor:
        return self.method.changed(weight, axis, self.config.seed, self.name, which)


def routed_parts(config: MoEConfig, path: str) -> list[Part]:
    """Return the part of each routed expert of the layer at a path."""
    parts = []
    for expert in range(config.experts):
        shard = expert % config.granularity
        down_scale = config.granularity / (1 + _holders(config, shard))
        bias_scale = 1 / (1 + config.shared_experts)
        parts.append(Part(f"{path}.experts.{expert}", config, config.method, shard, down_scale, bias_scale))
    return parts


def shared_parts(config: MoEConfig, path: str) -> list[Part]:
    """Return the part of each shared expert of the layer at a path; they are copies whatever the method."""
    parts = []
    for expert in range(config.shared_experts):
        shard = expert % config.granularity
        down_scale, bias_scale = 1 / (1 + _holders(config, shard)), 1 / (1 + config.shared_experts)
        parts.append(Part(f"{path}.shared_expert.{expert}", config, Copy(), shard, down_scale, bias_scale))
    return parts


def _holders(config: MoEConfig, shard: int) -> int:
    """How many shared experts hold a shard."""
    return len(range(shard, config.shared_experts, config.granularity))


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else tensor * scale
