"""The shapes that are measured, and routings of tokens to experts.

Shape legend: T tokens, K choices per token, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moeify.kernels.tools import tuning


class Shape(NamedTuple):
    """A batch of tokens and the experts that they are routed to."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    zipf: bool = False  # whether a few experts get most of the tokens

    @property
    def share(self) -> int:
        """How many rows an expert has on average."""
        return self.tokens * self.top_k // self.experts

    @property
    def products(self) -> int:
        """Multiplications and additions of one projection: 2 * T * K * H * I."""
        return 2 * self.tokens * self.top_k * self.hidden * self.intermediate

    @property
    def for_tuning(self) -> tuning.Shape:
        """The same experts as `moeify.kernels.tools.tuning` takes them."""
        return tuning.Shape(self.hidden, self.intermediate, self.experts, self.top_k)


# Published by other kernels or by models, the most telling first.
SHAPES = {
    "Qwen3-30B-A3B": Shape(32768, 2048, 768, 128, 8),
    "Mixtral-8x7B": Shape(8192, 4096, 14336, 8, 2),
    "OLMoE": Shape(16384, 2048, 1024, 64, 8),
    "DeepSeek-V2-Lite": Shape(16384, 2048, 1408, 64, 6),
    "SonicMoE fine-grained": Shape(32768, 4096, 768, 128, 8),
    "MegaBlocks XS": Shape(65536, 512, 2048, 64, 1),
    "Mixtral-8x7B 32k": Shape(32768, 4096, 14336, 8, 2),
    "Qwen3 Zipf": Shape(32768, 2048, 768, 128, 8, zipf=True),
}
TINY = {"tiny": Shape(96, 64, 48, 6, 2), "tiny Zipf": Shape(96, 64, 48, 6, 2, zipf=True)}
DECODED = ("Qwen3-30B-A3B", "Mixtral-8x7B")
DECODE_TOKENS = (1, 4, 16, 64)


def shapes(dry: bool, *names: str) -> dict[str, Shape]:
    """Return the shapes of these names, or all; in a dry run the tiny ones."""
    if dry:
        return {"tiny": TINY["tiny"]} if names else TINY
    return {name: SHAPES[name] for name in names or SHAPES}


def route(shape: Shape, device: torch.device) -> Tensor:
    """Return distinct expert ids per token, (T, K), at random or by Zipf's law."""
    generator = torch.Generator(device).manual_seed(0)
    scores_TE = torch.rand(shape.tokens, shape.experts, generator=generator, device=device)
    if shape.zipf:  # Gumbel's trick: the top k of log p + noise are drawn by p, without replacement
        p_E = 1 / torch.arange(1, shape.experts + 1, device=device)
        scores_TE = p_E.log() - (-scores_TE.clamp(1e-9, 1 - 1e-7).log()).log()
    return scores_TE.topk(shape.top_k, 1).indices
