"""The settings of a conversion: one frozen dataclass, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from moeify.config.checks import Experts, ExpertsOrZero, NotNegative, Positive, Probability, check_fields
from moeify.config.choice import Choice, Chosen
from moeify.config.contracts import MethodChoice, RouterChoice
from moeify.config.presets import Presets
from moeify.errors import ConfigError

Balance = Literal["topk", "first_choice", "deepseek", "cv2"]
BalanceLevel = Literal["batch", "sequence", "global"]
DropOrder = Literal["position", "probability", "random", "batch_prioritized"]

_METHOD = Chosen(MethodChoice, "moeify.methods", "copy")
_ROUTER = Chosen(RouterChoice, "moeify.routers", "softmax")


@dataclass(frozen=True)
class MoEConfig(Presets):
    """How a dense FFN becomes experts and a router, and how the router is trained.

    The classmethods are the settings of the papers. Each takes any field as a keyword, to change it.

    Attributes:
        experts: Experts in each converted layer.
        top_k: Experts that each token visits; with expert choice, the mean number.
        method: How experts are made from the FFN: an object of `moeify.methods`, or its word, the name of its file.
            Only copies are exact.
        granularity: Each expert is one of this many shards of the FFN, and tokens choose whole groups of them, so
            `experts` and `top_k` count shards: 8 experts of which 2 are chosen are 32 and 8 with granularity 4.
        shared_experts: Experts, of the same size as the routed ones, that every token visits besides its top_k.
        router: What chooses the experts: an object of `moeify.routers`, or its word, the name of its file. Routers that
            look at later tokens say so there: they are for encoders and vision models.
        renormalize: The weights of the chosen experts sum to 1; with copies this makes the conversion exact. With
            `top_k=1` the weight is then always 1, and the router learns from the balancing loss alone. The default is
            True, and False with expert_choice and sinkhorn, whose papers do without.
        aux_loss: Coefficient of the balancing loss of each layer; 0 for none. Layers are summed. The default is 0.01,
            and 0 with a router that balances by itself (expert_choice, sinkhorn) or cannot be balanced (hash, soft).
        balance: What the balancing loss is. "topk": E * sum f P over all choices. "first_choice": the same over first
            choices (Switch, GShard). "deepseek": DeepSeek-V3's sequence loss. "cv2": squared variation of importance,
            and of load where there is noise (Shazeer).
        balance_level: Over which tokens "topk" and "first_choice" ask for balance: those of this forward pass
            ("batch"), of each sequence, or of all data-parallel ranks and of the micro-batches so far of the optimizer
            step ("global"; when compiled and under FSDP2, of the ranks alone).
        divide_loss_by_top_k: The loss "topk" is 1 on a balanced routing. If False it is k, as transformers'
            `router_aux_loss_coef` has it.
        divide_loss_by_layers: Losses are the mean over the converted layers instead of their sum, as in MegaBlocks.
        z_loss: Coefficient of mean(logsumexp(logits)^2) of each layer; 0 for none.
        attach_losses: Losses are added to the gradients in backward, so that a script that knows nothing of them
            trains balanced. If False the script adds `moeify.aux_loss(model)`.
        capacity_factor: In training an expert takes at most factor * tokens * top_k / experts; None for no limit.
        eval_capacity_factor: The same in evaluation. Expert choice, which needs one, takes `capacity_factor` for None.
        min_capacity: Whatever the factor, an expert takes this many tokens: in decoding there are few. 4 is that of
            mesh-tensorflow and DeepSpeed; Megatron has none, which is 1. Expert choice does not look at it.
        drop_order: Which choices of a full expert are kept: "position" (first come), "probability", "random",
            "batch_prioritized". "probability" and "batch_prioritized" let later tokens push out earlier ones.
        jitter: In training the router's input is multiplied by U[1-jitter, 1+jitter].
        expert_dropout: Dropout inside the experts, in training; None keeps what the dense FFN had.
        seed: Start of every random number; each tensor's numbers depend on this and the tensor's name only.

    Raises:
        ConfigError: A value does not fit; the message names the field.
    """

    experts: Experts
    top_k: Experts
    method: Chosen[MethodChoice] = _METHOD
    granularity: Experts = 1
    shared_experts: ExpertsOrZero = 0
    router: Chosen[RouterChoice] = _ROUTER
    renormalize: bool = None  # type: ignore[assignment]  # the router's, as soon as it is known
    aux_loss: NotNegative = None  # type: ignore[assignment]  # likewise
    balance: Balance = "topk"
    balance_level: BalanceLevel = "batch"
    divide_loss_by_top_k: bool = False
    divide_loss_by_layers: bool = False
    z_loss: NotNegative = 0.0
    attach_losses: bool = True
    capacity_factor: Positive | None = None
    eval_capacity_factor: Positive | None = None
    min_capacity: Experts = 4
    drop_order: DropOrder = "position"
    jitter: Probability = 0.0
    expert_dropout: Probability | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        derived = {name for name in ("renormalize", "aux_loss") if getattr(self, name) is None}
        check_fields(self, besides={"method", "router", *derived})
        if self.top_k > self.experts:
            raise ConfigError(f"top_k is {self.top_k} but there are only {self.experts} experts: lower top_k")
        if self.experts % self.granularity:
            raise ConfigError(f"granularity is {self.granularity}: {self.experts} experts do not make up whole FFNs")
        if self.top_k % self.granularity:
            raise ConfigError(f"top_k is {self.top_k}: with granularity {self.granularity} choose a multiple of it")
        for name in derived:
            object.__setattr__(self, name, getattr(self.router, name))
        self.router.check(self)
        _ = self.method  # reading it checks its options

    @property
    def exact(self) -> bool:
        """Whether the converted model must compute what the dense one did, in evaluation."""
        return self.method.exact and self.router.exact(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data; `MoEConfig.from_dict` is the inverse."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.to_dict() if isinstance(value, Choice) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MoEConfig:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: A field is missing or unknown, or its value does not fit.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"these are not the settings of a conversion: {error}") from error
