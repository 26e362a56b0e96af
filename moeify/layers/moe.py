"""The MoE layer: route, keep to the capacity, attach the losses, dispatch, run the experts, combine.

Shape legend: T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.errors import MoeifyError
from moeify.layers.dispatch import Dispatcher, LocalDispatcher
from moeify.layers.forward_record import ForwardRecord
from moeify.layers.model_inputs import ModelInputs, exporting
from moeify.routers.base import RouterModule
from moeify.routing.attach_loss import attach_loss
from moeify.routing.balance import StepCounts, layer_losses, step_counts, weighted_sum
from moeify.routing.capacity import drop_overflow, exact_factor, expert_capacity
from moeify.routing.losses import expert_counts
from moeify.routing.record import Routing, RoutingContext


class MoELayer(nn.Module):
    """Base class of the layers that stand where a dense FFN stood.

    Args:
        router: Chooses experts; its `config` is the layer's.
        experts: The routed experts, called with rows, expert ids and weights.
        shared_expert: Experts that every token visits, or None.
        dropout: Probability with which the dense FFN dropped its output, in training.
        path: The layer's place in the model, for messages.
        rounded: Its activation is that of the dense FFN up to rounding to float32 only.

    Attributes:
        dispatcher: Brings tokens to the experts and the results back.
        model_inputs: What the model was called with.
        capacity_factor: The limit in training, None for none; `set_capacity` changes it.
        eval_capacity_factor: The limit in evaluation, likewise.
        loss_share: Multiplies the coefficients of its losses: 1 / (number of layers) where the settings ask for it.
        defers_losses: Whether whoever called the model takes care of the losses that the layer would attach.
        asked_share: Multiplies them too: by it a tool has changed the coefficient in the model's config.
        led: Whether a model around the layer is running, and knows that.
        loss_scale: Multiplies the attached losses: what a script multiplies its own loss by before backward.
        counts_E: With a selection bias: tokens that chose each expert in training since the bias was last moved.
        record: What the last forward pass computed; None before the first, and not kept by pickle or deepcopy.
        chooses: Whether tokens choose experts: otherwise there is nothing to record or to balance.
    """

    chooses: ClassVar[bool] = True

    def __init__(
        self,
        router: RouterModule,
        experts: nn.Module,
        shared_expert: nn.Module | None = None,
        *,
        dropout: float = 0.0,
        path: str = "",
        rounded: bool = False,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared_expert = router, experts, shared_expert
        self.dropout, self.path, self.rounded = dropout, path, rounded
        config = self.config = router.config
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.capacity_factor: Fraction | None = None
        self.eval_capacity_factor: Fraction | None = None
        self.set_capacity(train=config.capacity_factor, evaluation=config.eval_capacity_factor)
        self.loss_share = self.loss_scale = self.asked_share = 1.0
        self.defers_losses = self.led = False
        self.model_inputs = ModelInputs()
        self.record: ForwardRecord | None = None
        # Not a buffer: DistributedDataParallel would overwrite every rank's counts with the first one's.
        self.counts_E: Tensor | None = None
        self._step: tuple[int, StepCounts] | None = None  # of the level "global": the weight's version, and the counts

    def set_capacity(self, *, train: float | Fraction | None, evaluation: float | Fraction | None) -> None:
        """Change the limits.

        Raises:
            ConfigError: A factor is not a positive finite number.
        """
        limits = [None if factor is None else exact_factor(factor) for factor in (train, evaluation)]
        self.capacity_factor, self.eval_capacity_factor = limits

    def with_shared(self, out_TH: Tensor, x_TH: Tensor) -> Tensor:
        """Add the outputs of the shared experts for tokens (T, H) to those of the routed ones."""
        if self.shared_expert is None:
            return out_TH
        ids_TK = torch.arange(self.config.shared_experts, device=x_TH.device).expand(x_TH.shape[0], -1)
        weights_TK = torch.ones_like(ids_TK, dtype=torch.float32)
        shared_TH: Tensor = self.shared_expert(x_TH, ids_TK, weights_TK)
        return out_TH + shared_TH

    def losses(self) -> dict[str, Tensor]:
        """Return the losses of the last forward pass, without their coefficients."""
        return {} if self.record is None else self._losses(self.record)

    def _losses(self, record: ForwardRecord) -> dict[str, Tensor]:
        return layer_losses(
            record.routing,
            self.config,
            mask_T=record.mask_T,
            sequences=max(record.sequences, 1),
            step=record.step,
        )

    def extra_repr(self) -> str:
        """Describe the layer in `repr`."""
        config = self.config
        said = {
            "dropout": self.dropout,
            "aux_loss": config.aux_loss if config.attach_losses else 0,
            "z_loss": config.z_loss if config.attach_losses else 0,
            "capacity_factor": float(self.capacity_factor or 0),
            "eval_capacity_factor": float(self.eval_capacity_factor or 0),
        }
        return ", ".join(f"{name}={value}" for name, value in said.items() if value)

    def __getstate__(self) -> dict[str, Any]:
        # Their tensors hang on a graph, which can be neither copied nor saved.
        return {**self.__dict__, "record": None, "_step": None}


class SparseMoE(MoELayer):
    """A sparse mixture of experts in the place of a dense FFN: same input, same output."""

    def forward(self, x: Tensor, token_ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map activations (…, H) to (…, H).

        Args:
            x: (…, H).
            token_ids: (B, L), where the caller hands them over (see `ModelInputs.tokens`).
            mask: (B, at least L), likewise.

        Raises:
            MoeifyError: A router logit is NaN or infinite; checked on the CPU alone, where it waits for no device.
        """
        x_TH = x.reshape(-1, x.shape[-1])
        mask_T, token_ids_T = self.model_inputs.tokens(x, token_ids, mask)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        routing = self.router(x_TH, RoutingContext(mask_T, token_ids_T, factor))
        sequences = x.shape[0] if x.dim() == 3 else 1
        record = ForwardRecord(routing, mask_T, sequences, self._counts_of_step(routing, mask_T))
        self._refuse_nonfinite(routing, mask_T)  # not before: other ranks wait for the counts
        if factor is not None and not self.config.router.keeps_capacity:
            routing, record.dropped = self._limit(routing, mask_T, factor)
        if self.training and self.config.attach_losses and not self.defers_losses:
            routing = self._attach(routing, record)
        self._remember(record)
        sent = self.dispatcher.dispatch(x_TH, routing)
        y = self.experts(sent.x, sent.expert_ids, sent.weights)
        out_TH = self.with_shared(self.dispatcher.combine(y, sent), x_TH)
        return F.dropout(out_TH.view(x.shape), self.dropout, self.training)

    def _limit(self, routing: Routing, mask_T: Tensor | None, factor: Fraction) -> tuple[Routing, Tensor]:
        """Drop choices that exceed an expert's capacity; padding takes none of it."""
        ids_TK, config = routing.expert_ids_TK, self.config
        if mask_T is not None:
            ids_TK = ids_TK.masked_fill(~mask_T.unsqueeze(-1), config.experts)
        capacity = expert_capacity(ids_TK.shape[0], config.experts, config.top_k, factor, minimum=config.min_capacity)
        ids_TK, dropped = drop_overflow(ids_TK, routing.scores_TE, capacity, order=config.drop_order)
        return replace(routing, expert_ids_TK=ids_TK, capacity=capacity), dropped

    def _counts_of_step(self, routing: Routing, mask_T: Tensor | None) -> StepCounts | None:
        """Count choices on all ranks, and add those of the earlier micro-batches of the same optimizer step."""
        if not self.training or exporting():
            return None
        if in_backward() and self._step is not None:
            return self._step[1]
        step = step_counts(routing, self.config, mask_T=mask_T, path=self.path)
        if step is None or torch.compiler.is_compiling():
            return step
        weight = next(self.router.parameters())
        if self._step is not None and weight.grad is not None and self._step[0] == weight._version:
            step = replace(step, counts_E=step.counts_E + self._step[1].counts_E)
        self._step = weight._version, step
        return step

    def _attach(self, routing: Routing, record: ForwardRecord) -> Routing:
        loss = weighted_sum(self._losses(record), self.config, self.loss_share * self.asked_share)
        if loss is None or not torch.is_grad_enabled():
            return routing
        record.balanced = True
        return replace(routing, weights_TK=attach_loss(routing.weights_TK, loss * self.loss_scale))

    def _remember(self, record: ForwardRecord) -> None:
        """Keep what was computed, once: not while exporting, nor when activation checkpointing computes it again."""
        if exporting() or in_backward():
            return
        if self.training and self.config.aux_loss and any(p.requires_grad for p in self.router.parameters()):
            record.follow(self.record)
        self.record = record
        if self.training and self.config.router.updates_bias:
            counts_E = expert_counts(record.routing.expert_ids_TK, self.config.experts, mask_T=record.mask_T)
            self.counts_E = counts_E if self.counts_E is None else self.counts_E + counts_E

    def _refuse_nonfinite(self, routing: Routing, mask_T: Tensor | None) -> None:
        logits_TE = routing.logits_TE
        if logits_TE.device.type != "cpu" or torch.compiler.is_compiling():
            return
        wrong_TE = ~torch.isfinite(logits_TE if mask_T is None else logits_TE[mask_T])
        if wrong_TE.any():
            why = (
                f"{self.path or 'an MoE layer'}: {int(wrong_TE.any(-1).sum())} of {len(wrong_TE)} tokens have a router "
                "logit that is NaN or infinite; look for what made the activations or the router's weight so"
            )
            self.dispatcher.abandon(logits_TE.device, why)
            raise MoeifyError(why)


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Return the MoE layers that moeify put into a model, by their paths, in the order of its modules."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MoELayer)}


def in_backward() -> bool:
    """Whether the autograd engine is running on this thread: then a forward is the replay of an earlier one."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
