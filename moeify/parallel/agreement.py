"""Ranks that hold different models are told so before the first step, on every rank, in the same words."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moeify.errors import ConfigError, MoeifyError
from moeify.layers import moe_layers
from moeify.ranks import told_by_ranks

_VALUES = 8  # of each parameter: enough to tell two seeds apart


def check_agreement(model: nn.Module, problem: MoeifyError | None, sizes: object = None) -> None:
    """Compare the models of all ranks, which must all call it.

    Args:
        model: The model, whole on every rank.
        problem: Why this rank cannot go on: the others must not wait for it.
        sizes: What the sizes of messages follow from, if they are fixed.

    Raises:
        MoeifyError: The problem.
        ConfigError: Another rank has one, or another model, other settings or other values.
    """
    mine = {"": str(problem)} if problem else {**_description(model), "the sizes of messages": repr(sizes)}
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    with told_by_ranks(f"rank {dist.get_rank()} could not compare its model with the other ranks"):
        dist.all_gather_object(everyone, mine)
    if problem:
        raise problem
    for rank, theirs in enumerate(everyone):
        if "" in theirs:
            raise ConfigError(f"rank {rank}: {theirs['']}")
    for rank, theirs in enumerate(everyone):
        for name in {**everyone[0], **theirs}:
            first, other = (found.get(name, "missing") for found in (everyone[0], theirs))
            if first != other:
                raise ConfigError(
                    f"rank 0 and rank {rank} differ in {name} ({first} and {other}): make the same model on "
                    "every rank, with the same settings, and the same seed or checkpoint"
                )


def _description(model: nn.Module) -> dict[str, str]:
    """Return the layers' settings and the beginnings of the parameters, by name."""
    layers = moe_layers(model).items()
    settings = {f"the settings of {name or 'the layer'}": repr(layer.config) for name, layer in layers}
    return {**settings, **{name: _beginning(parameter) for name, parameter in model.named_parameters()}}


def _beginning(parameter: Tensor) -> str:
    kind = f"{tuple(parameter.shape)} {parameter.dtype}"
    if parameter.is_meta or isinstance(parameter, DTensor):
        return kind
    return f"{kind} {parameter.detach().reshape(-1)[:_VALUES].tolist()}"
