"""The balancing loss of transformers' own MoE models, asked for in training and counted once per optimizer step."""

from __future__ import annotations

import inspect
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
        holder: What it reads the coefficient from.
    """

    def __init__(self, model: nn.Module, holder: Any) -> None:
        self.holder = holder
        self.coefficient: float = holder.router_aux_loss_coef
        self.handles: tuple[RemovableHandle, ...] = (
            model.register_forward_pre_hook(self.ask, with_kwargs=True),
            model.register_forward_hook(self.restore, always_call=True),
        )

    @classmethod
    def on(cls, model: nn.Module) -> list[StockLoss]:
        """Hook what adds the loss of its layers, in a model or wrapped in it."""
        models = [(module, _holder(module)) for module in model.modules() if adds_loss(module)]
        return [cls(module, holder) for module, holder in models if getattr(holder, COEFFICIENT, 0)]

    def ask(self, model: Any, args: object, kwargs: Mapping[str, object]) -> tuple[object, dict[str, object]]:
        """Ask for the loss, and weigh it."""
        given = dict(kwargs)
        if model.training and given.get("labels") is not None:
            given.setdefault(ASK, True)
            # A tensor, so that nothing waits for the device; a config would take a float only.
            vars(self.holder)[COEFFICIENT] = self.coefficient * share_of_step(model, given)
        return args, given

    def restore(self, *_: object) -> None:
        """Leave the coefficient as it was."""
        vars(self.holder)[COEFFICIENT] = self.coefficient

    def remove(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()


def adds_loss(model: nn.Module) -> bool:
    """Return whether the code of a model adds a balancing loss to its own, where it is asked for router logits.

    A head that transformers makes for any model (sequence classification) does not, though its base has routers.
    """
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and "load_balancing_loss_func" in code.co_names


def _holder(model: nn.Module) -> Any:
    """Return what a model reads the coefficient from: itself, or the config of its text (Qwen3-VL)."""
    return model if hasattr(model, COEFFICIENT) else text_config(model)
