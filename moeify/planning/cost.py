"""What a conversion costs: parameters, active parameters, checkpoint bytes and FLOPs per token, before and after."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from moeify.families.table import SHARED_WIDTH
from moeify.passes.matching.projection import as_projection
from moeify.plan import Plan, Site


@dataclass(frozen=True)
class Cost:
    """One model's numbers.

    Attributes:
        parameters: All of them, tied ones once.
        active: Those that one token meets (embeddings count whole, as is usual).
        bytes: Of the checkpoint's tensors.
        flops: Floating-point operations per token in matrix products with weights; attention scores, which depend on
            the length of the context, are not counted.
    """

    parameters: int
    active: int
    bytes: int
    flops: int


def dense_cost(model: nn.Module, graph_module: fx.GraphModule, nbytes: int) -> Cost:
    """Count a dense model.

    Args:
        model: The model, possibly on the meta device.
        graph_module: Its traced graph.
        nbytes: Bytes of its checkpoint's tensors.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = [p for node in graph_module.graph.nodes if (p := as_projection(node))]
    rows = [p.node.meta["val"].numel() // p.out_features for p in found]
    products = sum(n * p.in_features * p.out_features for n, p in zip(rows, found, strict=True))
    return Cost(parameters, parameters, nbytes, 2 * products // max(rows, default=1))


def moe_cost(dense: Cost, plan: Plan, itemsize: float) -> Cost:
    """Count the converted model.

    Args:
        dense: The dense model's numbers.
        plan: What is converted.
        itemsize: Bytes per stored parameter.
    """
    added = active = flops = 0
    config = plan.config
    for site in plan.sites:
        ffn, products, router = ffn_parameters(site), ffn_products(site), config.experts * site.hidden
        # a shard has 1/granularity of everything but the bias of the projection back, which each has whole
        back = site.hidden if site.down.bias else 0
        expert, work = (ffn - back) // config.granularity + back, products // config.granularity
        unused = (3 * SHARED_WIDTH + 1) * site.hidden if plan.target == "qwen2_moe" else 0
        added += (config.experts + config.shared_experts) * expert - ffn + router + unused
        active += (config.top_k + config.shared_experts) * expert - ffn + router + unused
        flops += 2 * ((config.top_k + config.shared_experts) * work - products + router + unused)
    return Cost(
        dense.parameters + added, dense.active + active, dense.bytes + int(added * itemsize), dense.flops + flops
    )


def ffn_products(site: Site) -> int:
    """Multiply-adds of an FFN for one token: the size of its weight matrices."""
    return site.hidden * (sum(rows.count for rows in site.ups) + site.intermediate)


def ffn_parameters(site: Site) -> int:
    """Parameters of a copy of an FFN; a missing bias beside one that exists counts: the stack holds zeros for it."""
    up_bias = sum(rows.count for rows in site.ups) if site.up_bias else 0
    return ffn_products(site) + up_bias + (site.hidden if site.down.bias else 0)
