"""The balancing loss of transformers' own MoE models, asked for in training and counted once per optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from moeify.contract.found import text_config
from moeify.contract.outputs import ASK, COEFFICIENT, share_of_step


class StockLoss:
    """The two hooks of a model: in training they ask for the balancing loss, where the caller did not say.

    transformers adds it to the loss of each micro-batch with the same coefficient, however many there are in a step.
    Here it counts by the share of the step's tokens that the micro-batch holds. Evaluation stays as it is.

    Args:
        model: A model that adds the loss itself (see `adds_loss`).
    """

    def __init__(self, model: Any) -> None:
        self.coefficient: float = model.router_aux_loss_coef
        self.handles: tuple[RemovableHandle, ...] = (
            model.register_forward_pre_hook(self.ask, with_kwargs=True),
            model.register_forward_hook(self.restore, always_call=True),
        )

    @classmethod
    def on(cls, model: nn.Module) -> list[StockLoss]:
        """Hook what adds the loss of its layers, in a model or wrapped in it."""
        return [cls(module) for module in model.modules() if adds_loss(module)]

    def ask(self, model: Any, args: object, kwargs: Mapping[str, object]) -> tuple[object, dict[str, object]]:
        """Ask for the loss, and weigh it."""
        given = dict(kwargs)
        if model.training and given.get("labels") is not None:
            given.setdefault(ASK, True)
            model.router_aux_loss_coef = self.coefficient * share_of_step(model, given)
        return args, given

    def restore(self, model: Any, *_: object) -> None:
        """Leave the coefficient as it was."""
        model.router_aux_loss_coef = self.coefficient

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()


def adds_loss(module: Any) -> bool:
    """Return whether a model of transformers adds a balancing loss to its own where it is asked for router logits."""
    return bool(getattr(module, COEFFICIENT, 0)) and hasattr(text_config(module), ASK)
