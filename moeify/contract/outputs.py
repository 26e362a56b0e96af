"""Router logits and the auxiliary loss, in the outputs of models that know no experts.

As in transformers' own MoE models: `output_router_logits`, in the config or in a call, adds `router_logits` and
`aux_loss` to the outputs, and `router_aux_loss_coef * aux_loss` to their loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields, make_dataclass
from typing import Any, get_args, get_type_hints

from torch import nn
from transformers.utils.generic import ModelOutput

from moeify.errors import RefusedError
from moeify.layers import MoELayer
from moeify.layers.moe import summed_losses

ASK, COEFFICIENT = "output_router_logits", "router_aux_loss_coef"
_ADDED = ("aux_loss", "router_logits")


class RouterOutputs:
    """The two hooks of a model: one hears what is asked for, the other adds it.

    Args:
        returned: The kinds of output that the model is known to return.

    Attributes:
        wanted: Whether the current forward pass is to return router logits.
        kinds: Kinds of output, with those that have the new fields: a compiler does not trace how a class is made.
    """

    def __init__(self, returned: Iterable[type[ModelOutput]]) -> None:
        self.wanted = False
        self.kinds = {kind: with_router_outputs(kind) for kind in returned}

    @classmethod
    def watch(cls, model: nn.Module) -> None:
        """Hook a model of transformers, once."""
        if any(isinstance(hook, cls) for hook in model._forward_pre_hooks.values()):
            return
        hooks = cls(_returned(model))
        model.register_forward_pre_hook(hooks, with_kwargs=True)
        model.register_forward_hook(hooks.add, with_kwargs=True)

    def __call__(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Take the request out of the arguments, which the model does not know.

        Raises:
            RefusedError: Router logits are asked for, and a router has none.
        """
        if "forward" in vars(model):
            self.wanted = False
            return args, dict(kwargs)  # a tool put its own forward there (TRL): it asks the model inside
        given = dict(kwargs)
        asked = given.pop(ASK, None)
        self.wanted = bool(getattr(_text_config(model), ASK, False) if asked is None else asked)
        if self.wanted:
            for path, layer in _layers(model).items():
                if not layer.config.router.has_logits:
                    word = layer.config.router.name
                    raise RefusedError(f"{path}: the router {word!r} has no logits of tokens: leave out {ASK}")
                layer.record = None  # of an earlier pass
        return args, given

    def add(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        """Add what the routers computed, and the loss of it."""
        del args
        if not self.wanted or not isinstance(output, ModelOutput):
            return None  # it stays
        ran = {layer: layer.record for layer in _layers(model).values() if layer.record is not None}
        kind = type(output)
        if kind not in self.kinds:
            self.kinds[kind] = with_router_outputs(kind)
        made: Any = self.kinds[kind]()
        for name, value in output.items():
            made[name] = value
        made.router_logits = tuple(record.routing.logits_TE for record in ran.values())
        total, settings = summed_losses(ran), [layer.config for layer in ran]
        made.aux_loss = None if total is None else total / (settings[0].aux_loss or 1.0)  # of one plan: one for all
        attached = any(config.attach_losses for config in settings)
        loss = getattr(made, "loss", None)
        if loss is not None and made.aux_loss is not None and not attached:
            made.loss = loss + getattr(_text_config(model), COEFFICIENT) * made.aux_loss.to(loss.device)
        return made


def with_router_outputs(kind: type[ModelOutput]) -> type[ModelOutput]:
    """Return a kind of output with the fields `aux_loss` and `router_logits` besides its own."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    added = [(name, Any, None) for name in _ADDED if name not in known]
    return make_dataclass(f"Moe{kind.__name__}", added, bases=(kind,)) if added else kind


def _layers(model: nn.Module) -> dict[str, MoELayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, MoELayer)}


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _returned(model: nn.Module) -> list[type[ModelOutput]]:
    """Return the kinds of output that the forward says it returns."""
    try:
        hint = get_type_hints(inspect.unwrap(type(model).forward)).get("return")
    except (NameError, TypeError):
        return []
    return [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, ModelOutput)]
