"""Make the layer of a site: its modules with the right shapes, and the values that they start with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeify.config import MoEConfig
from moeify.layers.experts import Experts
from moeify.layers.moe import MoELayer, SparseMoE
from moeify.layers.routing import ROUTERS
from moeify.layers.soft import SoftMoE, SoftRouter
from moeify.layers.start import router_start
from moeify.methods import ExpertWeights
from moeify.plan import Site


def build_layer(site: Site, config: MoEConfig, region: nn.Module | None, like: Tensor) -> MoELayer:
    """Make the layer of a site with zero weights, on the device and in the dtype of `like`.

    Args:
        site: The dense FFN.
        config: The settings.
        region: The captured activation; used when it has no name.
        like: A dense weight.
    """
    custom = site.activation == "custom"
    experts = Experts(
        site.hidden,
        site.intermediate,
        experts=config.experts,
        activation=site.activation,
        gated=site.gated,
        up_rows=sum(rows.count for rows in site.ups),
        up_bias=site.up_bias,
        down_bias=site.down.bias is not None,
        region=region if custom else None,
        region_widths=tuple(rows.count for rows in site.ups) if custom else (),
        dropout=site.expert_dropout if config.expert_dropout is None else config.expert_dropout,
        device=like.device,
        dtype=like.dtype,
    )
    if config.router == "soft":
        soft = SoftRouter(site.hidden, config, device=like.device, dtype=like.dtype)
        return SoftMoE(soft, experts, dropout=site.dropout, path=site.path)
    router = ROUTERS[config.router](site.hidden, config, device=like.device, dtype=like.dtype)
    return SparseMoE(router, experts, dropout=site.dropout, path=site.path)


@torch.no_grad()
def start_router(layer: MoELayer) -> None:
    """Give a layer's router the values that it starts with."""
    state = layer.router.state_dict(keep_vars=True)
    hidden: int = layer.experts.hidden  # type: ignore[assignment]
    for name, start in router_start(layer.config, hidden, layer.path).items():
        state[name].copy_(start.build())


def expert_values(site: Site, weights: ExpertWeights) -> dict[str, Tensor]:
    """Return stacked values by the names that a site's experts give them."""
    values = {
        site.up_name: weights.up_EJH,
        "down_proj": weights.down_EHI,
        f"{site.up_name}_bias": weights.up_bias_EJ,
        "down_proj_bias": weights.down_bias_EH,
    }
    return {name: value for name, value in values.items() if value is not None}
