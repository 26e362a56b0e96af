"""The two forms of experts, stacked and linears, in checkpoints: transformers' rules for loading and saving them.

A model has the form that its config says, and is saved in it. Its checkpoint may be in the other one: then the tensors
are merged or taken apart while they are loaded, one stacked tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from moeify.layers import Experts
from moeify.layers.linear_experts import GATE, UP, LinearExperts


class SaveStacked(WeightConverter):
    """A rule that stacks linears when they are saved."""


class _LoadOnly(WeightConverter):
    """A rule that saving does not reverse."""

    def reverse_transform(self) -> WeightTransform:
        return WeightRenaming("^$", "")  # no tensor has this name


class _TakeApart(ConversionOps):
    """One stacked tensor as views for the projections of all its experts, which are the target patterns in order."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: object
    ) -> dict[str, Any]:
        (found,) = input_dict.values()
        stacked: Tensor = found[0] if isinstance(found, list) else found
        parts = stacked.view(len(target_patterns), -1, *stacked.shape[2:])
        return dict(zip(target_patterns, parts, strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError


def loading_rules(model: PreTrainedModel, *options: Any, **named: Any) -> list[WeightTransform]:
    """Return the rules by which transformers loads a model: its own, and those for experts in the other form.

    For `from_pretrained` alone. transformers' registry of rules, which is by class, would tell them to PEFT too, which
    takes adapters on linears for adapters on stacked weights then.

    Args:
        model: The model, empty.
        options: As transformers' `get_model_conversion_mapping` takes them.
        named: Likewise.
    """
    return [*get_model_conversion_mapping(model, *options, **named), *_of_other_form(model)]


def to_save(path: str, module: nn.Module, rules: list[WeightTransform]) -> Iterator[WeightTransform]:
    """Return the rules that take the stacked tensors of stock experts apart; saving reverses them.

    Args:
        path: Of the experts.
        module: The experts.
        rules: Those by which the model is saved otherwise. Where they rename a stacked tensor, these rules have its
            final name: transformers before 5.24 renames what is stacked first, and loses it.
    """
    place = ".".join(path.split(".")[-2:])
    renamings = [rule.reverse_transform() for rule in rules if type(rule) is WeightRenaming]
    for name in dict(module.named_parameters(recurse=False)):
        stored = f"{place}.{name}"
        for renaming in renamings:
            stored, _ = renaming.rename_source_key(stored)
        yield _merge(SaveStacked, place, name, module, stored).reverse_transform()


def _of_other_form(model: PreTrainedModel) -> Iterator[WeightTransform]:
    """Return the rules for converted layers; those that stand in the same place of their layer share them."""
    places: dict[str, dict[str, nn.Module]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts) or (isinstance(module, LinearExperts) and isinstance(module.stacked, Experts)):
            known = path.removeprefix(f"{model.base_model_prefix}.")
            places.setdefault(".".join(path.split(".")[-2:]), {})[known] = module
    for place, found in places.items():
        first = next(iter(found.values()))
        alike = all(_names(module) == _names(first) for module in found.values())
        for where, module in ({place: first} if alike else found).items():
            for name in _names(module):
                linear = isinstance(module, LinearExperts)
                stored = f"{where}.{name}"
                yield _split(where, name, module) if linear else _merge(_LoadOnly, where, name, module, stored)


def _names(module: Any) -> list[str]:
    """Return the names of the stacked tensors, those of biases first: they begin as those of weights do."""
    held = module.shapes if isinstance(module, LinearExperts) else dict(module.named_parameters(recurse=False))
    return sorted(held, reverse=True)


def _merge(rule: type[WeightConverter], place: str, name: str, module: Any, stored: str) -> WeightTransform:
    """Return the rule that makes the stacked tensor `name`, called `stored`, of the tensors of all experts."""
    keys, kind = _projections(name)
    operations: list[Any] = [MergeModulelist(dim=0)]
    if len(keys) > 1:
        operations.append(Concatenate(dim=1))
        operations += [] if module.is_concatenated else [Interleave(dim=1, inverse=True)]
    if module.is_transposed and kind == "weight":
        operations.append(Transpose(dim0=1, dim1=2))
    return rule([f"{place}.*.{key}.{kind}" for key in keys], stored, operations)


def _split(place: str, name: str, module: Any) -> WeightTransform:
    """Return the rule that makes the tensors of all experts of the stacked tensor `name`."""
    keys, kind = _projections(name)
    targets = [f"{place}.{number}.{key}.{kind}" for number in range(module.num_experts) for key in keys]
    return _LoadOnly(f"{place}.{name}", targets, [_TakeApart()])


def _projections(name: str) -> tuple[tuple[str, ...], str]:
    """Return the projections whose weights, or biases, a stacked tensor holds."""
    stem, kind = name.removesuffix("_bias"), "bias" if name.endswith("_bias") else "weight"
    return (GATE, UP) if stem == "gate_up_proj" else (stem,), kind
