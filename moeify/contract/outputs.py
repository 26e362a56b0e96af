"""Router logits and the auxiliary loss, in the outputs of models that know no experts.

As in transformers' own MoE models: `output_router_logits`, in the config or in a call, adds `router_logits` and
`aux_loss` to the outputs, and `router_aux_loss_coef * aux_loss` to their loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields, make_dataclass
from typing import Any, get_args, get_type_hints

from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils.generic import ModelOutput

from moeify.errors import RefusedError
from moeify.layers import MoELayer
from moeify.routing.balance import weighted_sum

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
        made.aux_loss = _aux_loss(ran)
        attached = any(layer.config.attach_losses for layer in ran)
        loss = getattr(made, "loss", None)
        if loss is not None and made.aux_loss is not None and not attached:
            weight = getattr(_text_config(model), COEFFICIENT) * _share(model, kwargs)
            made.loss = loss + weight * made.aux_loss.to(loss.device)
        return made


def with_router_outputs(kind: type[ModelOutput]) -> type[ModelOutput]:
    """Return a kind of output with the fields `aux_loss` and `router_logits` besides its own."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    added = [(name, Any, None) for name in _ADDED if name not in known]
    return make_dataclass(f"Moe{kind.__name__}", added, bases=(kind,)) if added else kind


def _aux_loss(layers: Iterable[MoELayer]) -> Tensor | None:
    """Return the losses of all layers, for `router_aux_loss_coef` to multiply; None where none is asked for."""
    total: Tensor | None = None
    for layer in layers:
        loss = weighted_sum(layer.losses(), layer.config)
        if loss is None:
            continue
        loss = loss / (layer.config.aux_loss or 1.0)
        loss = loss.detach() if layer.config.attach_losses else loss
        total = loss if total is None else total + loss.to(total.device)
    return total


def _share(model: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return the share of this batch in all that a step accumulates, by which the model's own loss is divided too.

    transformers' Trainer passes `num_items_in_batch`, over accumulated batches and ranks. Its own MoE models add their
    loss whole each time, and so as often as there are batches (huggingface/transformers#48690).
    """
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    shifts = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss  # the trainer counts like this
    counted = labels[..., 1:] if shifts and not model.config.is_encoder_decoder else labels
    return (counted != -100).sum() / items


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
