"""Make the layer of a site: its modules with the right shapes, and the values that they start with."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from moeify.config import MoEConfig
from moeify.layers.experts import Experts
from moeify.layers.moe import MoELayer, SparseMoE
from moeify.layers.soft import SoftMoE
from moeify.methods.parts import DenseFFN, Part, routed_parts, shared_parts
from moeify.plan import Site
from moeify.routers.base import RouterModule


def build_layer(site: Site, config: MoEConfig, region: nn.Module | None, like: Tensor) -> MoELayer:
    """Make the layer of a site with zero weights, on the device and in the dtype of `like`.

    Args:
        site: The dense FFN.
        config: The settings.
        region: The captured activation; used when it has no name.
        like: A dense weight.
    """
    experts = _stack(site, config, config.experts, region, like)
    shared = _stack(site, config, config.shared_experts, region, like) if config.shared_experts else None
    router = cast(RouterModule, config.router.module(site.hidden, config, device=like.device, dtype=like.dtype))
    layer = SoftMoE if config.router.mixes_tokens else SparseMoE
    return layer(router, experts, shared, dropout=site.dropout, path=site.path)


def _stack(site: Site, config: MoEConfig, count: int, region: nn.Module | None, like: Tensor) -> Experts:
    custom = site.activation == "custom"
    return Experts(
        site.hidden,
        site.intermediate // config.granularity,
        num_experts=count,
        activation=site.activation,
        gated=site.gated,
        up_rows=sum(rows.count for rows in site.ups) // config.granularity,
        up_bias=site.up_bias,
        down_bias=site.down.bias is not None,
        region=region if custom else None,
        region_widths=tuple(rows.count for rows in site.ups) if custom else (),
        dropout=site.expert_dropout if config.expert_dropout is None else config.expert_dropout,
        device=like.device,
        dtype=like.dtype,
    )


@torch.no_grad()
def start_layer(layer: MoELayer, site: Site, dense: DenseFFN) -> None:
    """Give a layer the values that it starts with.

    Args:
        layer: What `build_layer` returned for the site.
        site: The dense FFN.
        dense: Its weights.
    """
    for name, parts in expert_parts(site, layer.config).items():
        stack = layer.get_submodule(name)
        for expert, part in enumerate(parts):
            for parameter, value in expert_values(site, part, dense).items():
                stack.get_parameter(parameter)[expert].copy_(value)
    state = layer.router.state_dict(keep_vars=True)
    for name, start in layer.config.router.start(layer.config, site.hidden, layer.path).items():
        state[name].copy_(start.build())


def expert_parts(site: Site, config: MoEConfig) -> dict[str, list[Part]]:
    """Return the part of each expert of a site, by the name of the stack that it is in."""
    found = {"experts": routed_parts(config, site.path), "shared_expert": shared_parts(config, site.path)}
    return {name: parts for name, parts in found.items() if parts}


def expert_values(site: Site, part: Part, dense: DenseFFN) -> dict[str, Tensor]:
    """Return one expert's values by the names of the stack's parameters."""
    widths = [rows.count for rows in site.ups]
    values = {site.up_name: part.ups(dense.up_JH, widths), "down_proj": part.down(dense.down_HI)}
    if dense.up_bias_J is not None:
        values[f"{site.up_name}_bias"] = part.ups(dense.up_bias_J, widths)
    if dense.down_bias_H is not None:
        values["down_proj_bias"] = part.down_bias(dense.down_bias_H)
    return values
