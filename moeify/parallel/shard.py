"""Expert parallelism for a model: its stacked experts are sharded, and its layers send tokens between ranks."""

from __future__ import annotations

import gc
from typing import TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from moeify.arguments import check_model
from moeify.errors import ConfigError
from moeify.layers import MoELayer, moe_layers
from moeify.layers.dispatch import LocalDispatcher
from moeify.layers.experts import Experts
from moeify.layers.quantized_experts import QuantizedExperts
from moeify.parallel.agreement import check_agreement
from moeify.parallel.dispatcher import ExpertParallel
from moeify.parallel.exchange import Link
from moeify.parallel.gradients import LocalWeights
from moeify.parallel.mesh import Ranks, ranks_of
from moeify.parallel.noise import NoiseOfRank
from moeify.parallel.static import StaticExpertParallel
from moeify.routing.capacity import expert_capacity

ModelT = TypeVar("ModelT", bound=nn.Module)


def parallelize(model: ModelT, mesh: DeviceMesh, *, tokens: int | None = None) -> ModelT:
    """Let every rank hold and compute a part of the experts; all ranks must call it.

    The stacked parameters become DTensors, sharded over their first dimension; the model may be on the meta device and
    get its weights later. Call it before `fully_shard`, DistributedDataParallel and the optimizer. Gradients are the
    mean over all ranks, for experts as for everything else. Layers draw other random numbers on every rank.

    Args:
        model: A converted model, the same on every rank.
        mesh: The dimension "ep" of a mesh over all ranks, whose other dimensions are data-parallel.
        tokens: The most tokens that a rank has in a forward pass. Messages then have one size, that of the capacity of
            so many tokens, and no host waits for counts. None for messages of the choices that are kept.

    Returns:
        The model, changed in place.

    Raises:
        ConfigError: The mesh does not fit, the experts cannot be divided by its size, an optimizer holds them already,
            the model is wrapped or parallel already or has no experts, a layer has no capacity for `tokens`, or the
            ranks hold different models.
    """
    ranks, problem, rows = ranks_of(mesh), None, None
    layers: dict[str, MoELayer] = {}
    try:
        check_model(model)
        layers = moe_layers(model)
        _check(model, layers, ranks.size)
        rows = None if tokens is None else _rows_of_all(layers, tokens)
    except ConfigError as error:
        problem = error
    check_agreement(model, problem, rows)
    for name, layer in layers.items():
        _shard(layer.experts, ranks)
        LocalWeights(ranks, layer.path or name or "the MoE layer").attach(layer.experts)
    connect_ranks(layers, ranks.group, rows)
    ignored = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)  # type: ignore[no-untyped-call]
    return model


def connect_ranks(layers: dict[str, MoELayer], group: dist.ProcessGroup, rows: list[int] | None = None) -> None:
    """Let layers whose experts are sharded send tokens between the ranks of a group, and draw noise of their own.

    Args:
        layers: The layers of a model, by their paths.
        group: The ranks.
        rows: For messages of one size: the choices that an expert of each layer takes of a rank.
    """
    paths = tuple(layer.path or name for name, layer in layers.items())
    size = dist.get_world_size(group)
    widest = max(layer.config.experts for layer in layers.values()) // size
    for number, layer in enumerate(layers.values()):
        NoiseOfRank().attach(layer)
        link, here = Link(group, paths, number), layer.config.experts // size
        layer.dispatcher = (
            ExpertParallel(link, here, widest) if rows is None else StaticExpertParallel(link, here, rows[number])
        )


def _rows_of_all(layers: dict[str, MoELayer], tokens: int) -> list[int]:
    """Return the choices that an expert of each layer takes of a rank with so many tokens."""
    if tokens < 1:
        raise ConfigError(f"tokens is {tokens}: give the most tokens that a rank has in a forward pass")
    rows = []
    for name, layer in layers.items():
        config, factors = layer.config, (layer.capacity_factor, layer.eval_capacity_factor)
        fixed = [factor for factor in factors if factor is not None]
        if not fixed or config.router.keeps_capacity:
            raise ConfigError(
                f"{name or 'the MoE layer'} has no capacity factor, so its messages have no size: leave out tokens, or "
                "call moeify.set_capacity(model, 1.25) before"
            )
        sizes = (expert_capacity(tokens, config.experts, config.top_k, f, minimum=config.min_capacity) for f in fixed)
        rows.append(max(sizes))
    return rows


def _check(model: nn.Module, layers: dict[str, MoELayer], size: int) -> None:
    kind = type(model).__name__
    if isinstance(model, DistributedDataParallel):
        raise ConfigError("the model is wrapped already: call moeify.parallelize first, then DistributedDataParallel")
    if not layers:
        raise ConfigError(
            f"{kind} has no MoE layer of moeify, so there is nothing to shard: convert it first (for transformers' own "
            "layers there is from_pretrained(…, distributed_config=…))"
        )
    for name, layer in layers.items():
        if not isinstance(layer.dispatcher, LocalDispatcher):
            raise ConfigError(f"{name or kind} is parallel already: call moeify.parallelize once")
        if isinstance(layer.experts, QuantizedExperts):
            raise ConfigError(
                f"{name or kind} has quantized experts, which cannot be shared among ranks: load it whole"
            )
        if not isinstance(layer.experts, Experts):
            raise ConfigError(f"{name or kind} has no stacked experts: moeify.stack(model) gives them back")
        if any(isinstance(parameter, DTensor) for parameter in layer.experts.parameters()):
            raise ConfigError(f"{name or kind} is sharded already: call moeify.parallelize before fully_shard")
        if layer.config.experts % size:
            raise ConfigError(
                f"{name or kind} has {layer.config.experts} experts, which {size} ranks cannot share evenly: choose a "
                "size of 'ep' that divides them"
            )
    _check_optimizers(layers)


def _check_optimizers(layers: dict[str, MoELayer]) -> None:
    """Refuse if an optimizer would go on training the whole experts, which nothing reads any more."""
    stacks = {id(p) for layer in layers.values() for p in layer.experts.parameters()}
    optimizers = [found for found in gc.get_objects() if issubclass(type(found), Optimizer)]
    groups = [group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ())]
    if any(id(parameter) in stacks for group in groups for parameter in group["params"]):
        raise ConfigError("an optimizer holds the experts already: call moeify.parallelize before making the optimizer")


def _shard(experts: nn.Module, ranks: Ranks) -> None:
    """Keep this rank's experts; a copy, for a view would keep the memory of all."""
    assert isinstance(experts, Experts)
    count = experts.num_experts // ranks.size
    mine = slice(ranks.place * count, (ranks.place + 1) * count)
    for name, parameter in list(experts.named_parameters(recurse=False)):
        local = parameter.detach()[mine].clone()
        sharded = DTensor.from_local(local, ranks.mesh, [Shard(0)], run_check=False)
        experts.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
    experts.num_experts = count  # what the implementations of experts count
