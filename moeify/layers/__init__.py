"""The layer that stands where a dense FFN stood: a router, stacked experts, and what was around them."""

from __future__ import annotations

from moeify.layers.experts import Experts
from moeify.layers.moe import MoELayer, SparseMoE, moe_layers
from moeify.layers.soft import SoftMoE

__all__ = ["Experts", "MoELayer", "SoftMoE", "SparseMoE", "moe_layers"]
