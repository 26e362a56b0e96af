"""What routers share: the base class of their options, and the base classes of their modules.

Nothing is kept between calls, and no router waits for the device. Ties go where `torch.topk` puts them, always to k
different experts. A NaN logit gives NaN weights, which the layer reports.

Shape suffixes, here and in the routers: T tokens, H hidden size, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from moeify.config import MoEConfig
from moeify.config.contracts import RouterChoice, StartValue
from moeify.routing.logits import at_least_fp32, jitter_inputs, router_init, router_logits
from moeify.routing.record import NO_CONTEXT, Routing, RoutingContext

__all__ = ["LinearRouter", "Router", "RouterModule", "StartValue", "Zeros", "drawn"]

Zeros = Callable[..., Tensor]  # `torch.zeros` on the device and in the dtype of the layer


@dataclass(frozen=True)
class Router(RouterChoice):
    """Base class of routers: the fields of a subclass are its options."""

    def start(self, config: MoEConfig, hidden: int, path: str) -> dict[str, StartValue]:
        """Return the start value of a linear projection."""
        return {"weight": drawn("weight", config, hidden, path)}


class RouterModule(nn.Module):
    """What an MoE layer takes for its router; it stays in float32 whatever dtype the model is moved to.

    Args:
        config: The settings; the layer takes them from here.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config

    def update_bias(self, counts_E: Tensor) -> None:
        """Move the selection bias, where the router has one, by how many tokens chose each expert, (E,)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RouterModule:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tensor in (*self.parameters(recurse=False), *self.buffers(recurse=False)):
            tensor.data = at_least_fp32(tensor.data) if tensor.is_floating_point() else tensor.data
        return self


class LinearRouter(RouterModule):
    """A router whose logits are a linear projection, in float32 whatever the model computes in.

    Args:
        options: The router's options.
        hidden: H.
        config: The settings.
        zeros: Makes the parameters.
    """

    def __init__(self, options: Router, hidden: int, config: MoEConfig, zeros: Zeros) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(zeros(config.experts, hidden))

    def forward(self, x_TH: Tensor, context: RoutingContext = NO_CONTEXT) -> Routing:
        """Route tokens (T, H)."""
        if self.training and self.config.jitter:
            x_TH = jitter_inputs(x_TH, self.config.jitter)
        return self.route(x_TH, context)

    def route(self, x_TH: Tensor, context: RoutingContext) -> Routing:
        """Choose experts for tokens to which jitter was applied."""
        raise NotImplementedError

    def logits(self, x_TH: Tensor) -> Tensor:
        """Project tokens (T, H) to (T, E)."""
        return router_logits(x_TH, self.weight)

    def extra_repr(self) -> str:
        """Describe the router in `repr`."""
        experts, hidden = self.weight.shape
        return f"{hidden} → {experts}, top-{self.config.top_k}"


def drawn(name: str, config: MoEConfig, hidden: int, path: str, rows: int = 1) -> StartValue:
    """Return random rows for each expert, equal for the experts of a group, which hold the shards of one FFN.

    Args:
        name: Name of the tensor in the router.
        config: The settings.
        hidden: H.
        path: The layer's place in the model.
        rows: Rows per expert.
    """

    def build() -> Tensor:
        groups = config.experts // config.granularity
        init = router_init((groups * rows, hidden), config.seed, f"{path}.router.{name}")
        return init.view(groups, rows, hidden).repeat_interleave(config.granularity, dim=0).flatten(0, 1)

    return StartValue((config.experts * rows, hidden), None, build)
