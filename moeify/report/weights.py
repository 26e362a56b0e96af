"""How alike the experts of a layer are, and how far each is from the dense FFN that it came from.

Shape legend: E experts, P parameters of an expert, H hidden size, J rows of the up projections.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from moeify.contract.found import FoundLayer
from moeify.conversion.layout import layer_tensors
from moeify.plan import Plan
from moeify.report.about import short
from moeify.report.data import LayerWeights

_NUMBER = re.compile(r"(?:^|(?<=[._]))\d+(?=\.)")  # of an expert: `3.up_proj.weight`, `expert_3.wi.weight`
MATRIX = 16  # experts up to which a matrix of all pairs is shown

Read = Callable[[str], Tensor]  # a dense parameter by its name


@torch.no_grad()
def weights_of(layer: FoundLayer, distance_E: Tensor | None = None) -> LayerWeights | None:
    """Compare the experts of a layer, whose weights are in memory; None where they cannot be told apart.

    Args:
        layer: The layer.
        distance_E: Of each expert from the dense FFN (`distances`), if it is known.
    """
    experts, pieces = layer.num_experts, list(_by_expert(layer))
    if experts < 2 or not pieces:
        return None
    gram_EE = torch.zeros(experts, experts, dtype=torch.float64)
    for piece_EP in pieces:
        gram_EE += (piece_EP @ piece_EP.t()).double()
    size_E = gram_EE.diagonal().sqrt().clamp(min=1e-30)
    cosine_EE = (gram_EE / size_E[:, None] / size_E).clamp(-1, 1)
    first, second = torch.triu_indices(experts, experts, offset=1)
    pairs = cosine_EE[first, second]
    most, least = int(pairs.argmax()), int(pairs.argmin())
    return LayerWeights(
        name=layer.path,
        mean=short(float(pairs.mean())),
        closest=(int(first[most]), int(second[most]), short(float(pairs[most]))),
        farthest=(int(first[least]), int(second[least]), short(float(pairs[least]))),
        cosine=rounded(cosine_EE) if experts <= MATRIX else (),
        distance=() if distance_E is None else tuple(map(short, distance_E.tolist())),
    )


def rounded(values: Tensor) -> tuple[tuple[float, ...], ...]:
    """Return a matrix as plain numbers."""
    return tuple(tuple(map(short, row)) for row in values.tolist())


def _by_expert(layer: FoundLayer) -> Iterator[Tensor]:
    """Yield the weights of all experts, (E, P) float32 each: of stacked tensors, of rows of one, and of linears."""
    alone: dict[tuple[int, str], list[Tensor]] = {}
    for place, part in enumerate(layer.experts):
        for name, parameter in part.named_parameters():
            alone.setdefault((place, _NUMBER.sub("*", name)), []).append(parameter)
    for (_, name), found in alone.items():
        if "*" in name and len(found) == layer.num_experts:
            yield torch.stack([parameter.flatten() for parameter in found]).float()
        elif "*" not in name and found[0].dim() > 1 and found[0].shape[0] % layer.num_experts == 0:
            yield found[0].reshape(layer.num_experts, -1).float()


@torch.no_grad()
def distances(layer: FoundLayer, plan: Plan, read: Read) -> Tensor | None:
    """Return how far each expert is from its part of the dense FFN, over the size of that, (E,).

    Args:
        layer: The layer, its experts stacked as moeify and transformers stack them.
        plan: By which it was made.
        read: Returns a dense parameter.

    Returns:
        None where the plan does not know the layer, or its experts have another form.
    """
    site = next((site for site in plan.sites if site.path == layer.path), None)
    held = {name: value for part in layer.experts for name, value in part.named_parameters(recurse=False)}
    if site is None:
        return None
    apart_E, size_E = torch.zeros(layer.num_experts), torch.zeros(layer.num_experts)
    for tensor in layer_tensors(site, plan.config):
        if not tensor.routed:
            continue
        found = held.get(tensor.name.removeprefix("experts."))
        if found is None or tuple(found.shape) != tensor.shape:
            return None
        plain = replace(tensor, blocks=tuple(replace(block, change=None) for block in tensor.blocks))
        dense = torch.empty(tensor.shape)
        plain.fill(dense, read)
        apart_E += (found.float() - dense).square().flatten(1).sum(1)
        size_E += dense.square().flatten(1).sum(1)
    return (apart_E / size_E.clamp(min=1e-30)).sqrt()
