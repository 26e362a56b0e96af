"""Expert parallelism by transformers' own engine: `from_pretrained(…, distributed_config=…)` of a moeify checkpoint.

transformers makes the meshes, shards the experts and everything else, and loads each rank's part. What it cannot know
it is told here: which modules hold experts. The layers then send their tokens themselves, as under
`moeify.parallelize`: transformers' own exchange stops at choices that a capacity has dropped.
"""

from __future__ import annotations

import copy
import re
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moeify.errors import ConfigError
from moeify.layers import Experts, MoELayer, moe_layers
from moeify.layers.implementations import OURS
from moeify.parallel.agreement import check_agreement
from moeify.parallel.shard import connect_ranks

if TYPE_CHECKING:
    from collections.abc import Callable

_SHARDED, _SENT_TO = "grouped_gemm", "ep_dispatch_experts"  # transformers' words for a stack and for its module
_DIVIDED_TWICE = {torch.float16, torch.float64}


class _Sizes(Protocol):
    """What is read of transformers' `DistributedConfig`."""

    ep_size: int
    tp_size: int
    efsdp_size: int
    ep_implementation: str


def offer_distribution() -> None:
    """Let transformers distribute models that hold layers of moeify; calling it again changes nothing."""
    untyped: Any = PreTrainedModel
    if find_spec("transformers.distributed.expert_parallel") is None:  # transformers before 5.24 has another engine
        return
    original = untyped.maybe_distribute_model
    if original.__func__.__module__ == __name__:
        return

    def distribute(cls: type[PreTrainedModel], model: Any, config: _Sizes | None, meshes: Any) -> Any:
        return _distribute(original, model, config, meshes)

    untyped.maybe_distribute_model = classmethod(distribute)


def _distribute(original: Callable[..., Any], model: Any, config: _Sizes | None, meshes: Any) -> Any:
    layers = moe_layers(model)
    if not layers or config is None or meshes is None:
        return original(model, config, meshes)
    model.tie_weights()
    model._fsdp_plan = _fsdp_plan(model, layers)
    if config.ep_size > 1:
        check_agreement(model, _problem(layers, config))
        _offer_ours()
        model._ep_plan = _ep_plan(layers)
        config = copy.copy(config)
        config.ep_implementation = OURS
    model = original(model, config, meshes)
    for layer in layers.values():
        router: nn.Module = layer.router
        if isinstance(router, FSDPModule):  # torch before 2.13 finds no tensor in what it returns, to gather it again
            router.set_reshard_after_forward(False)
    if config.ep_size > 1:
        connect_ranks(layers, meshes.get_mesh("ep").get_group())
    return model


def _offer_ours() -> None:
    """Tell transformers of an implementation that computes the rows that it is given: the layer has sent for them."""
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

    class Here(EPImplementation):
        def __call__(self, *rows: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.experts_forward(*rows)
            return out

    EPImplementationInterface.register(OURS, Here)


def _ep_plan(layers: dict[str, MoELayer]) -> dict[str, str]:
    """Name every stack and its module; transformers has one rule for all layers of a stack."""
    plan: dict[str, str] = {}
    for path, layer in layers.items():
        experts = _any_layer(f"{path}.experts")
        plan |= {f"{experts}.{name}": _SHARDED for name, _ in layer.experts.named_parameters(recurse=False)}
        plan[experts] = _SENT_TO
    return plan


def _fsdp_plan(model: Any, layers: dict[str, MoELayer]) -> dict[str, str]:
    """Return transformers' rules, as far as the model has what they name, one for each stack of layers, and routers.

    FSDP takes one dtype at a time, and routers stay in float32. A head that is tied to the embeddings is left to the
    unit of the whole model, which then holds both: transformers 5.24 shards them apart, and where the ranks do not
    divide the vocabulary evenly, the head goes on with the weights that were loaded.
    """
    modules = {_any_layer(path): module for path, module in model.named_modules()}
    plan = {name: style for name, style in model._fsdp_plan.items() if name in modules}
    stacks = {name for name, module in modules.items() if isinstance(module, GradientCheckpointingLayer)}
    routers = {_any_layer(f"{path}.router") for path in layers}
    if getattr(model, "all_tied_weights_keys", None):
        head = model.get_output_embeddings()
        plan = {name: style for name, style in plan.items() if modules[name] is not head}
    alone = {name for name in stacks if not _inside(name, stacks)} | routers
    return dict.fromkeys(alone, "free_full_weight") | plan


def _inside(name: str, others: set[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


def _any_layer(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)


def _problem(layers: dict[str, MoELayer], config: _Sizes) -> ConfigError | None:
    try:
        _check(layers, config)
    except ConfigError as error:
        return error
    return None


def _check(layers: dict[str, MoELayer], config: _Sizes) -> None:
    """Refuse what would crash, hang or train wrongly.

    Raises:
        ConfigError: One line that says what does not go together.
    """
    if config.ep_implementation not in {"auto", OURS}:
        raise ConfigError(
            f"ep_implementation is {config.ep_implementation!r}: layers of moeify send their tokens themselves, so "
            "leave it out"
        )
    if config.tp_size > 1:
        raise ConfigError(f"tp_size is {config.tp_size}: expert parallelism of moeify's layers goes beside FSDP only")
    for path, layer in layers.items():
        _check_experts(path, layer.experts, config)


def _check_experts(path: str, experts: nn.Module, config: _Sizes) -> None:
    if not isinstance(experts, Experts):
        raise ConfigError(f"{path} has no stacked experts: load it, call moeify.stack(model), and save that")
    if experts.num_experts % config.ep_size:
        raise ConfigError(
            f"{path} has {experts.num_experts} experts, which {config.ep_size} ranks cannot share evenly: choose an "
            "ep_size that divides them"
        )
    if experts.region is not None and any(True for _ in experts.region.parameters()):
        raise ConfigError(
            f"{path}: its activation has parameters, which all ranks must share: load it without distributed_config "
            "and call moeify.parallelize"
        )
    dtype = experts.down_proj.dtype
    if dtype in _DIVIDED_TWICE and config.efsdp_size == 1:  # torch 2.13, FSDP over one rank
        raise ConfigError(
            f"{path} is {str(dtype).removeprefix('torch.')}, in which torch divides gradients twice when ep_size is "
            "fsdp_size: choose a smaller ep_size, bfloat16 or float32"
        )
