"""Make the layer of a site, with zero weights."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from moeify.config import MoEConfig
from moeify.layers.experts import Experts
from moeify.layers.moe import MoELayer, SparseMoE
from moeify.layers.soft import SoftMoE
from moeify.plan import Plan, Site


def layer_in(root: nn.Module, site: Site, plan: Plan, region: nn.Module | None) -> MoELayer:
    """Make the layer of a site (see `build_layer`) for `root`, the model or graph that holds its dense weights.

    Experts are trained if one of those weights is, and routers always, because nobody froze what was not there.
    """
    layer = build_layer(site, plan.config, region, root.get_parameter(site.down.parameter))
    layer.loss_share = 1 / len(plan.sites) if plan.config.divide_loss_by_layers else 1.0
    trained = any(root.get_parameter(name).requires_grad for name in site.parameters)
    for stack in (layer.experts, layer.shared_expert):
        for parameter in () if stack is None else stack.parameters(recurse=False):
            parameter.requires_grad_(trained)
    return layer


def build_layer(site: Site, config: MoEConfig, region: nn.Module | None, like: Tensor) -> MoELayer:
    """Make the layer of a site with zero weights, on the device and in the dtype of `like`.

    Args:
        site: The dense FFN.
        config: The settings.
        region: The captured activation, with parameters of its own; used when it has no name.
        like: A dense weight.
    """
    experts = _stack(site, config, config.experts, region, like)
    own = copy.deepcopy(region) if config.shared_experts else None  # ties would not survive saving and loading
    shared = _stack(site, config, config.shared_experts, own, like) if config.shared_experts else None
    router = config.router.module(site.hidden, config, device=like.device, dtype=like.dtype)
    layer = SoftMoE if config.router.mixes_tokens else SparseMoE
    return layer(router, experts, shared, dropout=site.dropout, path=site.path, rounded=site.rounded)


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
