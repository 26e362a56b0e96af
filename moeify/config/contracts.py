"""What the library asks of a router and of a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from moeify.config.choice import Choice

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moeify.config.settings import MoEConfig

_SHORT = {"F16", "BF16"}


@dataclass(frozen=True)
class StartValue:
    """One tensor of a router before training.

    Attributes:
        shape: Its shape.
        dtype: Its own dtype, as safetensors spells it; None for that of the weights that the layer replaces.
        build: Compute it, on the CPU.
        short: Whether it is stored in 16 bits if those weights are. What a router learns is not: steps of an optimizer
            that are small beside a weight are lost in bfloat16, and all of them are at usual rates.
    """

    shape: tuple[int, ...]
    dtype: str | None
    build: Callable[[], Tensor]
    short: bool = False

    def stored(self, weights: str) -> str:
        """Return the dtype in which it is stored beside weights of another."""
        return self.dtype or ("F32" if weights in _SHORT and not self.short else weights)


@dataclass(frozen=True)
class RouterChoice(Choice):
    """All that the library asks of a router; `moeify.routers.base.Router` is the base class to use.

    Attributes:
        renormalize: The default of that setting.
        aux_loss: Likewise.
        sums_to_one: The weights of a token sum to 1 in evaluation, if the settings ask for it with `renormalize`.
        selects_by_more: The choice depends on more than the scores, such as a bias: the loss "topk" then counts the
            experts of the highest scores, as Megatron does.
        joint: In evaluation, what the router does with a token depends on the other tokens of the forward pass.
        needs_token_ids: It reads the ids of the tokens in the vocabulary.
        keeps_capacity: It keeps to the capacity itself: the layer drops no choices.
        mixes_tokens: Experts take mixtures of tokens: the layer is a `SoftMoE`.
        has_logits: Tokens have logits for experts, which are learnt.
        builds: Makes the module, called with the router, the hidden size, the settings and a `torch.zeros`.
    """

    kind = "router"
    renormalize: ClassVar[bool] = True
    aux_loss: ClassVar[float] = 0.01
    sums_to_one: ClassVar[bool] = True
    selects_by_more: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    needs_token_ids: ClassVar[bool] = False
    keeps_capacity: ClassVar[bool] = False
    mixes_tokens: ClassVar[bool] = False
    has_logits: ClassVar[bool] = True
    builds: ClassVar[Callable[..., Any]]

    @property
    def updates_bias(self) -> bool:
        """Whether a selection bias is to be moved after each optimizer step."""
        return False

    def check(self, config: MoEConfig) -> None:
        """Raise a ConfigError that names the field, if the router cannot work with the rest of the settings."""

    def exact(self, config: MoEConfig) -> bool:
        """Return whether equal experts compute together what one of them computes, in evaluation."""
        return self.sums_to_one and config.renormalize and config.eval_capacity_factor is None

    def module(
        self,
        hidden: int,
        config: MoEConfig,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Return the router's module, a `moeify.routers.base.RouterModule`, with zero weights, at least in float32."""
        import torch

        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        return type(self).builds(self, hidden, config, partial(torch.zeros, device=device, dtype=dtype))

    def start(self, config: MoEConfig, hidden: int, path: str) -> dict[str, StartValue]:
        """Return the values that the router's tensors start with, by name, in the order of its state dict.

        Random numbers depend on the seed of the settings and on `path`, the layer's place in the model, alone.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class MethodChoice(Choice):
    """All that the library asks of a method; `moeify.methods.base.Method` is the base class to use.

    Attributes:
        exact: Experts are unchanged parts of the dense FFN.
    """

    kind = "method"
    exact: ClassVar[bool] = False

    def changed(self, weight: Tensor, axis: int, seed: int, expert: str, which: str) -> Tensor:
        """Return one weight of an expert, changed.

        Args:
            weight: (out, in), any float dtype.
            axis: The axis of `weight` that runs over the intermediate size: 0 for an up projection, 1 for the down one.
            seed: The seed of the settings.
            expert: Name of the expert in the model; random numbers depend on it and the seed alone.
            which: Name of the weight in the expert.
        """
        raise NotImplementedError
