"""An optimizer's state follows the weights into the experts, so that training goes on where it was.

Momentum and second moments of a dense weight are cut and copied as the weight itself is, without scaling; steps are
copied. Each expert then starts with the dense weight's moments (the upcycling paper's choice for vision, Komatsuzaki et
al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moeify.conversion.weights import dense_ffn
from moeify.errors import RefusedError
from moeify.layers.build import expert_parts, expert_values
from moeify.plan import Plan, Site


@dataclass(frozen=True)
class Carried:
    """An optimizer, and the dense parameters that a conversion will take from it, by name."""

    optimizer: Optimizer
    plan: Plan
    dense: dict[str, nn.Parameter]

    @torch.no_grad()
    def hand_over(self, model: nn.Module) -> None:
        """Give the experts the state and the group of the dense weights that they replaced; routers start afresh.

        A weight that the optimizer did not hold has experts that it does not hold either; a router goes where the
        projection back was.

        Args:
            model: The model, converted by the plan.
        """
        for site in self.plan.sites:
            sources = _sources(site)
            for name, value in self._site_state(site).items():
                parameter = model.get_parameter(f"{site.path}.{name}")
                self.optimizer.state[parameter] = {**self._scalars(sources[name.rpartition(".")[2]]), **value}
            layer = model.get_submodule(site.path)
            for name, parameter in layer.named_parameters():
                source = site.down.parameter if name.startswith("router.") else sources[name.partition(".")[2]]
                self._add(self.dense[source], parameter, f"{site.path}.{name}")
        self._forget_dense()

    def _site_state(self, site: Site) -> dict[str, dict[str, Tensor]]:
        """The experts' state tensors: by parameter of the layer, then by the optimizer's name for the state."""
        found: dict[str, dict[str, Tensor]] = {}
        states = [self.optimizer.state.get(self.dense[name], {}) for name in site.parameters]
        for key in dict.fromkeys(key for state in states for key, value in state.items() if _is_moment(value)):

            def read(name: str, key: str = key) -> Tensor:
                parameter = self.dense[name]
                value = self.optimizer.state.get(parameter, {}).get(key)
                return torch.zeros_like(parameter) if value is None else value

            dense = dense_ffn(site, read)
            for stack, parts in expert_parts(site, self.plan.config).items():
                experts = [expert_values(site, part.moments(), dense) for part in parts]
                for name in experts[0]:
                    found.setdefault(f"{stack}.{name}", {})[key] = torch.stack([values[name] for values in experts])
        return found

    def _scalars(self, source: str) -> dict[str, Any]:
        state = self.optimizer.state.get(self.dense[source], {})
        return {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in state.items()
            if not _is_moment(value)
        }

    def _add(self, source: nn.Parameter, parameter: nn.Parameter, name: str) -> None:
        for group in self.optimizer.param_groups:
            if any(p is source for p in group["params"]):
                group["params"].append(parameter)
                if "param_names" in group:
                    group["param_names"].append(name)
                return

    def _forget_dense(self) -> None:
        gone = {id(parameter) for parameter in self.dense.values()}
        for group in self.optimizer.param_groups:
            kept = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
            for field in {"params", "param_names"} & group.keys():
                group[field] = [group[field][i] for i in kept]
        for parameter in self.dense.values():
            self.optimizer.state.pop(parameter, None)


def take_up(optimizer: Optimizer, model: nn.Module, plan: Plan) -> Carried:
    """Look at what an optimizer holds for the weights that a plan replaces, before anything is changed.

    Raises:
        RefusedError: it holds none of them, or a state that is not of its weight's shape and cannot be split with it.
    """
    dense = {name: model.get_parameter(name) for site in plan.sites for name in site.parameters}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(parameter) in held for parameter in dense.values()):
        raise RefusedError(
            f"the optimizer holds none of the {len(dense)} weights to be converted: was it made for another model?"
        )
    for name, parameter in dense.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if _is_moment(value) and value.shape != parameter.shape:
                raise RefusedError(
                    f"the optimizer's {key} of {name} has shape {tuple(value.shape)}, the weight "
                    f"{tuple(parameter.shape)}: only states of the weight's shape can follow it; convert first"
                )
    return Carried(optimizer, plan, dense)


def _sources(site: Site) -> dict[str, str]:
    """The dense parameter that gives an expert parameter its step and its group."""
    return dict(_pairs(site))


def _pairs(site: Site) -> Iterator[tuple[str, str]]:
    yield site.up_name, site.ups[0].parameter
    yield "down_proj", site.down.parameter
    up_bias = next((rows.bias for rows in site.ups if rows.bias), None)
    if up_bias:
        yield f"{site.up_name}_bias", up_bias
    if site.down.bias:
        yield "down_proj_bias", site.down.bias


def _is_moment(value: Any) -> bool:
    """Whether a state is one value for each weight, not one for all."""
    return isinstance(value, Tensor) and value.dim() > 0
