"""An optimizer's state follows the weights into the experts, so that training goes on where it was.

Momentum and second moments of a dense weight are cut and copied as the weight itself is, without changes or scaling;
steps are copied. Each expert then starts with the dense weight's moments (the upcycling paper's choice for vision,
Komatsuzaki et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moeify.conversion.layout import LayerTensor, layer_tensors
from moeify.errors import RefusedError
from moeify.plan import Plan


class DenseState:
    """What an optimizer holds for the weights that a plan replaces, looked at before anything is changed.

    Args:
        optimizer: The optimizer.
        model: The dense model.
        plan: What will be replaced.

    Raises:
        RefusedError: It holds none of them, or a state that is not of its weight's shape and cannot be split with it.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, plan: Plan) -> None:
        self.optimizer, self.plan = optimizer, plan
        held = {name: attrgetter(name)(model) for site in plan.sites for name in site.reads}
        self.dense = {name: value for name, value in held.items() if isinstance(value, nn.Parameter)}
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(parameter) in known for parameter in self.dense.values()):
            raise RefusedError(
                f"the optimizer holds none of the {len(self.dense)} weights to be converted: was it made for another "
                "model?"
            )
        for name, parameter in self.dense.items():
            for key, value in self._state(name).items():
                if is_moment(value) and value.shape != parameter.shape:
                    raise RefusedError(
                        f"the optimizer's {key} of {name} has shape {tuple(value.shape)}, the weight "
                        f"{tuple(parameter.shape)}: only states of the weight's shape can follow it; convert first"
                    )

    @torch.no_grad()
    def move_to(self, model: nn.Module) -> None:
        """Give the new parameters the state and the group of the dense ones that they replace; routers start afresh.

        A weight that the optimizer did not hold has experts that it does not hold either; a router joins the group of
        the down projection.

        Args:
            model: The model, converted by the plan.
        """
        for site in self.plan.sites:
            tensors = {tensor.name: tensor for tensor in layer_tensors(site, self.plan.config)}
            for name, parameter in model.get_submodule(site.path).named_parameters():
                sources = tensors[name].sources
                if self._join(sources or (site.down.parameter,), parameter, f"{site.path}.{name}") and sources:
                    self._move(tensors[name], parameter)
        self._forget_dense()

    def _move(self, tensor: LayerTensor, parameter: nn.Parameter) -> None:
        """Give a new parameter the state of its dense sources; where one of several has none yet, its moments are 0."""
        states = [state for name in tensor.sources if (state := self._state(name))]
        for key, like in {key: value for state in reversed(states) for key, value in state.items()}.items():
            moved = like.clone() if isinstance(like, Tensor) else like
            if is_moment(like):
                moved = torch.zeros_like(parameter, dtype=like.dtype, device=like.device)
                tensor.unchanged().fill(moved, partial(self._moment, key))
            self.optimizer.state[parameter][key] = moved

    def _state(self, name: str) -> dict[str, object]:
        state: dict[str, object] = self.optimizer.state.get(self.dense[name], {})
        return state

    def _moment(self, key: str, name: str) -> Tensor:
        value = self._state(name).get(key)
        return value if isinstance(value, Tensor) else torch.zeros_like(self.dense[name])

    def _join(self, sources: Sequence[str], parameter: nn.Parameter, name: str) -> bool:
        """Put a new parameter into the group of its sources; return whether the optimizer holds one of them."""
        wanted = {id(self.dense[source]) for source in sources}
        for group in self.optimizer.param_groups:
            if any(id(p) in wanted for p in group["params"]):
                group["params"].append(parameter)
                if "param_names" in group:
                    group["param_names"].append(name)
                return True
        return False

    def _forget_dense(self) -> None:
        gone = {id(parameter) for parameter in self.dense.values()}
        for group in self.optimizer.param_groups:
            kept = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
            for field in {"params", "param_names"} & group.keys():
                group[field] = [group[field][i] for i in kept]
        for parameter in self.dense.values():
            self.optimizer.state.pop(parameter, None)


def is_moment(value: object) -> TypeGuard[Tensor]:
    """Return whether a state has one value for each weight, not one for all."""
    return isinstance(value, Tensor) and value.dim() > 0
