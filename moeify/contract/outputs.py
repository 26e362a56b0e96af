"""Router logits and the auxiliary loss, in the outputs of models that know no experts.

As in transformers' own MoE models: `output_router_logits`, in the config or in a call, adds `router_logits` and
`aux_loss` to the outputs, and `router_aux_loss_coef * aux_loss` to their loss. Where nobody asks and the settings
attach the losses, a model in training adds their gradients to its loss and leaves its value as it is: whatever a script
does to the loss, such as dividing it by accumulation steps, is done to both.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields, make_dataclass
from typing import Any, get_args, get_type_hints

import torch.distributed as dist
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils.generic import ModelOutput

from moeify.contract.found import text_config
from moeify.errors import RefusedError
from moeify.layers import MoELayer, moe_layers
from moeify.layers.forward_record import ForwardRecord, summed_losses

ASK, COEFFICIENT = "output_router_logits", "router_aux_loss_coef"
_ADDED = ("aux_loss", "router_logits")


class RouterOutputs:
    """The two hooks of a model: one hears what is asked for, the other adds it.

    Args:
        returned: The kinds of output that the model is known to return.

    Attributes:
        wanted: Whether the current forward pass is to return router logits.
        attaches: Whether its loss takes the gradients of the layers' losses.
        leads: Whether the layers run for this model, and not for one around it.
        kinds: Kinds of output, with those that have the new fields: a compiler does not trace how a class is made.
    """

    def __init__(self, returned: Iterable[type[ModelOutput]]) -> None:
        self.wanted = self.attaches = self.leads = False
        self.kinds = {kind: with_router_outputs(kind) for kind in returned}

    @classmethod
    def watch(cls, model: nn.Module) -> None:
        """Hook a model of transformers, once."""
        if any(isinstance(hook, cls) for hook in model._forward_pre_hooks.values()):
            return
        hooks = cls(_returned(model))
        model.register_forward_pre_hook(hooks, with_kwargs=True)
        model.register_forward_hook(hooks.add, with_kwargs=True, always_call=True)

    def __call__(
        self, model: nn.Module, args: object, kwargs: Mapping[str, object]
    ) -> tuple[object, dict[str, object]]:
        """Take the request out of the arguments, which the model does not know.

        Raises:
            RefusedError: Router logits are asked for, and a router has none.
        """
        given, asked = dict(kwargs), kwargs.get(ASK)
        self.wanted = bool(getattr(text_config(model), ASK, False) if asked is None else asked)
        if tools := self.wanted and "forward" in vars(model):
            self.wanted = False  # a tool put its own forward there (TRL): it asks the model inside
        else:
            given.pop(ASK, None)
        layers = moe_layers(model) if self.wanted or model.training else {}
        if self.wanted:
            _refuse_without_logits(layers)
        self.leads = model.training and not any(layer.led for layer in layers.values())
        self.attaches = self.leads and not self.wanted and not tools and _has_labels(given)
        for layer in layers.values():
            if self.leads or not layer.led:
                layer.defers_losses = self.wanted or self.attaches
                layer.asked_share = _asked_share(model, layer) if tools else 1.0
            layer.led = layer.led or self.leads
        return args, given

    def add(self, model: nn.Module, args: object, kwargs: Mapping[str, object], output: object) -> object:
        """Add what the routers computed, and the loss of it; None is the output of a model that failed."""
        layers = moe_layers(model).values() if self.leads or self.wanted else ()
        for layer in layers if self.leads else ():
            layer.led = False
        if self.wanted and isinstance(output, ModelOutput):
            return self._with_router_outputs(model, output, layers, _share(model, kwargs, layers))
        if self.attaches and not any(layer.record is not None and layer.record.balanced for layer in layers):
            return _with_gradients(output, layers, _share(model, kwargs, layers))
        return None  # it stays

    def _with_router_outputs(
        self, model: nn.Module, output: ModelOutput, layers: Iterable[MoELayer], share: Tensor | float
    ) -> object:
        kind = type(output)
        if kind not in self.kinds:
            self.kinds[kind] = with_router_outputs(kind)
        made: Any = self.kinds[kind]()
        for name, value in output.items():
            made[name] = value
        ran = [layer for layer in layers if layer.record is not None]
        made.router_logits = tuple(_logits(layer, layer.record) for layer in ran if layer.record is not None)
        total = summed_losses(ran)
        # For `router_aux_loss_coef` to multiply.
        made.aux_loss = None if total is None else total / (ran[0].config.aux_loss or 1.0)
        loss = getattr(made, "loss", None)
        if loss is not None and made.aux_loss is not None:
            coefficient = getattr(text_config(model), COEFFICIENT) * share
            made.loss = loss + (coefficient * made.aux_loss).to(loss.device)
        return made


def with_router_outputs(kind: type[ModelOutput]) -> type[ModelOutput]:
    """Return a kind of output with the fields `aux_loss` and `router_logits` besides its own."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    added = [(name, object, None) for name in _ADDED if name not in known]
    return make_dataclass(f"Moe{kind.__name__}", added, bases=(kind,)) if added else kind


def _with_gradients(output: Any, layers: Iterable[MoELayer], share: Tensor | float) -> object:
    """Let backward through the loss in an output add the gradients of the layers' losses."""
    total = summed_losses(layer for layer in layers if layer.config.attach_losses)
    loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    if total is None or not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
        return None
    silent = (total * share).to(loss.device)
    loss = loss + (silent - silent.detach())
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output.loss = loss
    return output


def _asked_share(model: nn.Module, layer: MoELayer) -> float:
    """Return what a tool has made of the coefficient that the layer was converted with."""
    return float(getattr(text_config(model), COEFFICIENT, 0) / layer.config.aux_loss) if layer.config.aux_loss else 1.0


def _logits(layer: MoELayer, record: ForwardRecord) -> Tensor:
    """Return router logits; without gradients where the layer balances itself, so that it is not done twice.

    TRL computes transformers' loss from them, over the tokens of all layers together: layers that err in opposite ways
    look balanced to it.
    """
    logits_TE = record.routing.logits_TE
    return logits_TE.detach() if record.balanced and not layer.defers_losses else logits_TE


def _has_labels(given: Mapping[str, object]) -> bool:
    """Whether the model is called for a loss."""
    names = (name for name, value in given.items() if value is not None and value is not False)
    return any("label" in name or name in {"start_positions", "return_loss"} for name in names)


def _share(model: Any, given: Mapping[str, object], layers: Iterable[MoELayer]) -> Tensor | float:
    """Return what multiplies the layers' losses: this pass's part of the step.

    At the level "global" that is its mean over ranks: there each rank's losses count by its tokens already.
    """
    share = share_of_step(model, given)
    level = any(layer.config.balance_level == "global" for layer in layers)
    if not (level and model.training and isinstance(share, Tensor) and dist.is_initialized()):
        return share
    together = share.detach().double()
    dist.all_reduce(together)
    return (together / dist.get_world_size()).to(share.dtype)


def share_of_step(model: Any, given: Mapping[str, object]) -> Tensor | float:
    """Return the part of `num_items_in_batch` that the labels of this pass are, counted as the Trainer does.

    transformers passes that number over accumulated batches and ranks, and divides the model's loss by it. Its own MoE
    models add their loss whole each time, and so as often as there are batches (huggingface/transformers#48690).
    """
    total, shifted, labels = (given.get(name) for name in ("num_items_in_batch", "shift_labels", "labels"))
    causal = LOSS_MAPPING.get(getattr(model, "loss_type", "")) is ForCausalLMLoss
    if shifted is None and isinstance(labels, Tensor):
        shifted = labels[..., 1:] if causal and not model.config.is_encoder_decoder else labels
    if not isinstance(shifted, Tensor) or not isinstance(total, Tensor | int):
        return 1.0
    return shifted.ne(-100).sum() / total


def _refuse_without_logits(layers: Mapping[str, MoELayer]) -> None:
    for path, layer in layers.items():
        if not layer.config.router.has_logits:
            word = layer.config.router.name
            raise RefusedError(f"{path}: the router {word!r} has no logits of tokens: leave out {ASK}")
        layer.record = None  # of an earlier pass


def _returned(model: nn.Module) -> list[type[ModelOutput]]:
    """Return the kinds of output that the forward says it returns."""
    try:
        hint = get_type_hints(inspect.unwrap(type(model).forward)).get("return")
    except (NameError, TypeError):
        return []
    return [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, ModelOutput)]
