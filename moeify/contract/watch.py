"""What a stock MoE layer does in a forward pass, seen by hooks; and a capacity for it.

A hook on the router sees its logits, one on the experts the choices and their weights. Shape suffixes: T tokens, E
experts, K choices per token, B sequences, L positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeify.config import MoEConfig
from moeify.contract.scores import scores_of, scoring_of
from moeify.layers.forward_record import ForwardRecord
from moeify.layers.model_inputs import ModelInputs, exporting
from moeify.layers.moe import in_backward
from moeify.routing.capacity import drop_overflow, exact_factor, expert_capacity
from moeify.routing.losses import load_balancing_loss, z_loss
from moeify.routing.record import Routing


@dataclass(frozen=True)
class _Pass:
    """What was seen of a forward pass; its scores are found when they are asked for, as that waits for the device."""

    logits_TE: Tensor
    expert_ids_TK: Tensor
    weights_TK: Tensor | None
    mask_T: Tensor | None
    sequences: int
    dropped: Tensor | None


class Watch:
    """The two hooks on a stock layer, and what they saw; it stands for the layer as `MoELayer` does for itself.

    Args:
        num_experts: E.
        top_k: K.
        logits_at: Index of the router logits in what the router returns; None to find them by their shape.

    Attributes:
        model_inputs: What the model was called with.
        capacity_factor: The limit in training, None for none; `set_capacity` changes it.
        eval_capacity_factor: The limit in evaluation, likewise.
    """

    def __init__(self, num_experts: int, top_k: int, logits_at: int | None) -> None:
        self.num_experts, self.top_k, self.logits_at = num_experts, top_k, logits_at
        self.model_inputs = ModelInputs()
        self.capacity_factor: Fraction | None = None
        self.eval_capacity_factor: Fraction | None = None
        self._names: tuple[str, str] | None = None
        self._hooks: list[RemovableHandle] = []
        self._routed: tuple[object, ...] = ()
        self._classified: object = None
        self._seen: _Pass | None = None
        self._scoring: str | None = None

    @classmethod
    def on(cls, router: nn.Module) -> Watch | None:
        """Return the watch whose hook a router has."""
        hooks = (getattr(hook, "__self__", None) for hook in router._forward_hooks.values())
        return next((watch for watch in hooks if isinstance(watch, cls)), None)

    def attach(self, router: nn.Module, experts: nn.Module) -> None:
        """Hook a layer."""
        self._names = choice_names(experts)  # once: a compiler does not trace how a signature is read
        self._hooks = [
            router.register_forward_hook(self.hear),
            experts.register_forward_pre_hook(self.see, with_kwargs=True),
        ]
        inner = (part for part in router.modules() if part is not router)
        classifier = next((part for part in inner if getattr(part, "out_features", 0) == self.num_experts), None)
        if classifier is not None:
            self._hooks.append(classifier.register_forward_hook(self.hear_classifier))

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def set_capacity(self, *, train: float | Fraction | None, evaluation: float | Fraction | None) -> None:
        """Change the limits; see `MoELayer.set_capacity`."""
        limits = [None if factor is None else exact_factor(factor) for factor in (train, evaluation)]
        self.capacity_factor, self.eval_capacity_factor = limits

    @property
    def record(self) -> ForwardRecord | None:
        """What the last forward pass computed; None before the first. The first time it waits for the device."""
        seen = self._seen
        if seen is None:
            return None
        if self._scoring is None and seen.weights_TK is not None:
            self._scoring = scoring_of(seen.logits_TE, seen.expert_ids_TK, seen.weights_TK)
        scores_TE = scores_of(seen.logits_TE, self._scoring or "softmax")
        weights_TK = scores_TE.gather(-1, seen.expert_ids_TK) if seen.weights_TK is None else seen.weights_TK
        routing = Routing(seen.expert_ids_TK, weights_TK, seen.logits_TE, scores_TE)
        return ForwardRecord(routing, seen.mask_T, seen.sequences, dropped=seen.dropped)

    def losses(self) -> dict[str, Tensor]:
        """Return the losses of the last forward pass, without coefficients, on the scale of transformers' losses."""
        return {} if (record := self.record) is None else {"balance": stock_losses([record])["balance"]}

    def hear(self, router: nn.Module, args: object, output: object) -> None:
        """Keep what the router returned: a forward hook."""
        del router, args
        self._routed = tuple(output) if isinstance(output, tuple | list) else (output,)

    def hear_classifier(self, classifier: nn.Module, args: object, output: object) -> None:
        """Keep the logits of a linear layer inside the router: Switch's returned none before transformers 5.24."""
        del classifier, args
        self._classified = output

    def see(self, experts: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Any:
        """Keep what goes to the experts, and hold it to the capacity: a forward pre-hook."""
        routed, self._routed = self._routed, ()
        logits_TE, self._classified = self._logits(routed), None
        if logits_TE is None:
            return None
        (mask_T, sequences), dropped = self._tokens(logits_TE), None
        ids_TK, weights_TK = self._choices(args, kwargs)
        if ids_TK is None or weights_TK is None:
            ids_TK = logits_TE.topk(self.top_k, dim=-1).indices
            weights_TK = self._weights(routed, ids_TK)
            dropped = self._dropped_by_router(routed, mask_T)
        elif (factor := self.capacity_factor if experts.training else self.eval_capacity_factor) is not None:
            kept_TK, dropped = self._limit(ids_TK, logits_TE, mask_T, factor)
            limited = weights_TK.masked_fill(kept_TK == self.num_experts, 0)  # stock experts may not skip ids
            args, kwargs = self._replaced(args, kwargs, limited)
        if not exporting() and not in_backward():
            self._seen = _Pass(logits_TE, ids_TK, weights_TK, mask_T, sequences, dropped)
        return args, kwargs

    def _choices(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[Tensor | None, Tensor | None]:
        """Return the choices and weights (T, K) that the experts are called with, where they are called with such."""
        if self._names is None:
            return None, None
        ids, weights = (args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(self._names, start=1))
        if not isinstance(ids, Tensor) or not isinstance(weights, Tensor) or ids.shape != weights.shape:
            return None, None
        of_experts = ids.shape[-1] == self.num_experts != self.top_k  # a mask of experts, not their numbers
        return (None, None) if of_experts else (ids, weights)

    def _weights(self, routed: tuple[object, ...], ids_TK: Tensor) -> Tensor | None:
        """Return the weights (T, K) that a router gives for each choice or for each expert, if it does."""
        for place, given in enumerate(routed):
            if place == self.logits_at or not isinstance(given, Tensor) or not given.is_floating_point():
                continue
            if given.dim() > 1 and given.shape[-1] == self.top_k:
                return given.reshape(ids_TK.shape)
            if given.shape[-1:] == (self.num_experts,):
                return given.reshape(-1, self.num_experts).gather(-1, ids_TK)
        return None

    def _logits(self, routed: tuple[object, ...]) -> Tensor | None:
        """Return the router logits (T, E): from where they are said to be, or else the first of such columns."""
        said = routed[self.logits_at : self.logits_at + 1] if self.logits_at is not None else ()
        for found in (*said, *routed, self._classified):
            if isinstance(found, Tensor) and found.is_floating_point() and found.shape[-1:] == (self.num_experts,):
                return found.reshape(-1, self.num_experts)
        return None

    def _tokens(self, logits_TE: Tensor) -> tuple[Tensor | None, int]:
        """Return the padding mask (T,) and the number of sequences, as far as the model's inputs tell them."""
        tokens, known = logits_TE.shape[0], self.model_inputs
        given = known.mask if known.token_ids is None else known.token_ids
        if not isinstance(given, Tensor) or given.dim() != 2 or not len(given) or tokens % len(given):
            return None, 1
        x_BLE = logits_TE.view(len(given), -1, logits_TE.shape[-1])
        return known.tokens(x_BLE)[0], len(given)

    def _limit(
        self, ids_TK: Tensor, logits_TE: Tensor, mask_T: Tensor | None, factor: Fraction
    ) -> tuple[Tensor, Tensor]:
        if mask_T is not None:
            ids_TK = ids_TK.masked_fill(~mask_T.unsqueeze(-1), self.num_experts)
        tokens, top_k = ids_TK.shape
        capacity = expert_capacity(tokens, self.num_experts, top_k, factor, minimum=MoEConfig.min_capacity)
        return drop_overflow(ids_TK, logits_TE, capacity)

    def _dropped_by_router(self, routed: tuple[object, ...], mask_T: Tensor | None) -> Tensor | None:
        """Return how many first choices a router with a capacity of its own dropped: it returns a mask of the kept."""
        masks = (t for t in routed if isinstance(t, Tensor) and not t.is_floating_point())
        kept = next((mask for mask in masks if mask.dim() and mask.shape[-1] == self.num_experts), None)
        if kept is None or self.top_k > 1:
            return None
        kept_T = kept.reshape(-1, self.num_experts).sum(-1)
        lost_T = kept_T == 0 if mask_T is None else (kept_T == 0) & mask_T
        return lost_T.sum()

    def _replaced(
        self, args: tuple[object, ...], kwargs: Mapping[str, object], weights_TK: Tensor
    ) -> tuple[tuple[object, ...], Mapping[str, object]]:
        """Return the arguments of the experts with other weights."""
        assert self._names is not None
        if len(args) > 2:
            return (*args[:2], weights_TK, *args[3:]), kwargs
        return args, {**kwargs, self._names[1]: weights_TK}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_routed": (), "_classified": None, "_seen": None, "_hooks": []}  # see `MoELayer`


def stock_losses(records: list[ForwardRecord]) -> dict[str, Tensor]:
    """Return the losses over the tokens of all these layers together, without coefficients: as transformers does it.

    Args:
        records: Of layers with the same number of experts.
    """
    device = records[0].routing.scores_TE.device

    def together(name: str) -> Tensor:
        return torch.cat([getattr(record.routing, name).to(device) for record in records])

    masks = [torch.ones_like(r.routing.scores_TE[:, 0], dtype=torch.bool) if r.mask_T is None else r.mask_T
             for r in records]  # fmt: skip
    mask_T = None if all(r.mask_T is None for r in records) else torch.cat([mask.to(device) for mask in masks])
    ids_TK = together("expert_ids_TK")
    balance = load_balancing_loss(together("scores_TE"), ids_TK, divide_by_top_k=False, mask_T=mask_T)
    return {"balance": balance, "z": z_loss(together("logits_TE").float(), mask_T=mask_T)}


def choice_names(experts: nn.Module) -> tuple[str, str] | None:
    """Return what experts call the choices and the weights that follow the tokens; None if they take no such things.

    Where PEFT wraps them, the module inside knows.
    """
    for module in experts.modules():
        names = [
            name
            for name, p in inspect.signature(module.forward).parameters.items()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        if len(names) > 2:
            return names[1], names[2]
    return None
