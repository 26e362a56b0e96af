"""An optimizer's state follows the weights into the experts, so that training goes on where it was.

Momentum and second moments of a dense weight are cut and copied as the weight itself is, without changes or scaling;
steps are copied. Each expert then starts with the dense weight's moments (the upcycling paper's choice for vision,
Komatsuzaki et al. 2022). Groups that list parameters in the model's order do so afterwards too: a saved state goes by
position, and is loaded into an optimizer made for the converted model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moeify.conversion.layout import LayerTensor, layer_tensors
from moeify.errors import RefusedError, first_line
from moeify.plan import Plan


class DenseState:
    """What an optimizer holds for the weights that a plan replaces, looked at before anything is changed.

    Args:
        optimizer: The optimizer.
        model: The dense model.
        plan: What will be replaced.

    Raises:
        RefusedError: It holds none of them, or a state that is not of its weight's shape and cannot be split with it.
            Or it takes no parameters of three dimensions, as stacked experts are (Muon).
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, plan: Plan) -> None:
        self.optimizer, self.plan = optimizer, plan
        held = {name: attrgetter(name)(model) for site in plan.sites for name in site.reads}
        self.dense = {name: value for name, value in held.items() if isinstance(value, nn.Parameter)}
        _check_takes_stacks(optimizer)
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
        self.ordered = [group for group in optimizer.param_groups if _is_sorted(group["params"], _places(model))]

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
        places = _places(model)
        for group in self.ordered:
            found = [places[id(parameter)] for parameter in group["params"]]
            order = sorted(range(len(found)), key=found.__getitem__)
            for field in {"params", "param_names"} & group.keys():
                group[field] = [group[field][i] for i in order]

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


def _places(model: nn.Module) -> dict[int, int]:
    """Return the place of each parameter of a model, by its id."""
    return {id(parameter): place for place, parameter in enumerate(model.parameters())}


def _is_sorted(parameters: Sequence[Tensor], places: Mapping[int, int]) -> bool:
    found = [places.get(id(parameter), -1) for parameter in parameters]
    return -1 not in found and found == sorted(found)


def _check_takes_stacks(optimizer: Optimizer) -> None:
    """Let another optimizer of its kind try a step on a parameter of three dimensions."""
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    kind, stack = type(inner), nn.Parameter(torch.zeros(2, 2, 2))
    stack.grad = torch.zeros_like(stack)
    accepted = inspect.signature(kind).parameters.keys() & inner.defaults.keys()
    try:
        kind([stack], **{name: inner.defaults[name] for name in accepted}).step()
    except (ValueError, RuntimeError) as error:
        raise RefusedError(
            f"{kind.__name__} cannot train experts, which are stacked in three dimensions ({first_line(error)}): give "
            "the weights to be converted to another optimizer"
        ) from error
    except TypeError:
        return  # it is made in a way of its own, and may well take them


def is_moment(value: object) -> TypeGuard[Tensor]:
    """Return whether a state has one value for each weight, not one for all."""
    return isinstance(value, Tensor) and value.dim() > 0
