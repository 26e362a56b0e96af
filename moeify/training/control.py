"""Settings of a live model: what is trained, with which options, and within which capacity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from moeify.contract.track import track
from moeify.errors import ConfigError, RefusedError
from moeify.training.layers_of import layers_of

ModelPart = Literal["experts", "routers", "moe", "dense", "non_moe"]


def set_capacity(model: nn.Module, factor: float | None, *, when: Literal["eval", "train", "always"] = "eval") -> None:
    """Change the capacity factor of every layer.

    Args:
        model: Any model with MoE layers. In transformers' own, the weights of dropped choices become zero.
        factor: The factor; None for no limit (for expert choice: that of its settings).
        when: The mode that it applies to.

    Raises:
        ConfigError: The factor is not a positive finite number, or `when` is unknown.
        RefusedError: A layer of transformers' has a capacity of its own, or hides its choices from its experts.
    """
    if when not in {"eval", "train", "always"}:
        raise ConfigError(f"when is {when!r}: expected 'eval', 'train' or 'always'")
    for obstacle in (layer.capacity_obstacle for layer in layers_of(model).values()):
        if obstacle is not None:
            raise RefusedError(obstacle)
    track(model)
    for state in (layer.state for layer in layers_of(model).values()):
        assert state is not None  # it is tracked
        state.set_capacity(
            train=state.capacity_factor if when == "eval" else factor,
            evaluation=state.eval_capacity_factor if when == "train" else factor,
        )


def freeze(model: nn.Module, what: ModelPart) -> None:
    """Stop training a part of a model; `model.requires_grad_(True)` trains everything again.

    Args:
        model: Any model with MoE layers.
        what: "experts"; "routers"; "moe", both of them; "dense", everything but the experts; "non_moe", everything
            outside the MoE layers, so that only these are trained.

    Raises:
        ConfigError: There is no such part.
    """
    parts = {
        "experts": ("experts",),
        "routers": ("routers",),
        "moe": ("experts", "routers"),
        "dense": ("routers", "rest"),
        "non_moe": ("rest",),
    }
    if what not in parts:
        raise ConfigError(f"cannot freeze {what!r}: expected one of {', '.join(parts)}")
    divided = _divide(model)
    for part in parts[what]:
        for parameter in divided[part]:
            parameter.requires_grad_(False)


def param_groups(
    model: nn.Module,
    *,
    routers: Mapping[str, object] | None = None,
    experts: Mapping[str, object] | None = None,
    rest: Mapping[str, object] | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer, each with options of its own.

    Example: `AdamW(moeify.param_groups(model, routers={"lr": 1e-3, "weight_decay": 0.0}), lr=1e-4)`.

    Args:
        model: Any model with MoE layers.
        routers: Options of the routers' group, such as lr and weight_decay; the optimizer's defaults fill the rest.
        experts: Options of the experts' group.
        rest: Options of the group of everything else.

    Returns:
        Groups, each with a "name"; frozen parameters and groups without parameters are left out.
    """
    divided = _divide(model)
    options = {"routers": routers, "experts": experts, "rest": rest}
    groups = [
        {"name": name, "params": [p for p in divided[name] if p.requires_grad], **(options[name] or {})}
        for name in options
    ]
    return [group for group in groups if group["params"]]


def _divide(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return every parameter once: those of the routers, of the experts, and the rest."""
    kinds: dict[int, str] = {}
    for layer in layers_of(model).values():
        for part in ("routers", "experts"):
            kinds |= {id(parameter): part for parameter in layer.part(part)}
    divided: dict[str, list[Tensor]] = {"routers": [], "experts": [], "rest": []}
    for parameter in model.parameters():
        divided[kinds.get(id(parameter), "rest")].append(parameter)
    return divided
