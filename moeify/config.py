"""What the user decides about a conversion: one frozen dataclass, checked when it is made, and the papers' presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any

from moeify.errors import ConfigError

Fields = Mapping[str, Any]
METHODS = ("copy", "noise", "drop")
ROUTERS = ("softmax", "gshard", "noisy_topk", "sigmoid", "expert_choice", "sinkhorn", "hash", "soft")
BALANCES = ("topk", "first_choice", "deepseek", "cv2")
LEVELS = ("batch", "sequence", "global")
DROP_ORDERS = ("position", "probability", "random", "batch_prioritized")


@dataclass(frozen=True)
class MoEConfig:
    """How a dense FFN becomes experts and a router, and how the router is trained.

    The classmethods are the settings of the papers. Each takes any field as a keyword, to change it.

    Attributes:
        experts: Experts in each converted layer.
        top_k: Experts that each token visits; with expert choice, the mean number.
        method: How experts are made from the FFN. "copy": each is a copy (sparse upcycling, Komatsuzaki et al. 2022).
            "noise": a copy with noise on a share of its weights. "drop": a copy with a share of its neurons drawn anew
            (Drop-Upcycling, Nakamura et al. 2025). Only "copy" is exact.
        granularity: Each expert is one of this many shards of the FFN, and tokens choose whole groups of them, so
            `experts` and `top_k` count shards: 8 experts of which 2 are chosen are 32 and 8 with granularity 4.
        shared_experts: Experts, as wide as the routed ones, that every token visits besides its top_k.
        share: "noise" and "drop" only: the share of weights, or of neurons, that is changed.
        noise_std: "noise" only: its standard deviation.
        renormalize: The weights of the chosen experts sum to 1; with "copy" this makes the conversion exact.
        aux_loss: Coefficient of the balancing loss of each layer; 0 for none. Layers are summed.
        seed: Start of every random number; each tensor's numbers depend on this and the tensor's name only.
        router: Who chooses. "softmax": the k most probable (Mixtral; Switch with top_k 1). "gshard": the second of two
            at random, in training. "noisy_topk": learned noise, in training (Shazeer). "sigmoid": DeepSeek-V3's.
            "expert_choice": experts choose tokens. "sinkhorn": a balanced plan chooses, in training (S-BASE). "hash":
            by token id. "soft": slots that mix tokens (Soft MoE). Expert choice, sinkhorn and soft look at later
            tokens: they are for encoders and vision models.
        balance: What the balancing loss is. "topk": E * sum f P over all choices. "first_choice": the same over first
            choices (Switch, GShard). "deepseek": DeepSeek-V3's sequence loss. "cv2": squared variation of importance,
            and of load where there is noise (Shazeer).
        normalize_topk: "topk" is 1 on a balanced routing. If False it is k, as transformers' `router_aux_loss_coef`
            has it.
        balance_level: Over which tokens "topk" and "first_choice" ask for balance: those of this forward pass
            ("batch"), of each sequence, or of all data-parallel ranks ("global").
        z_loss: Coefficient of mean(logsumexp(logits)^2) of each layer; 0 for none.
        attach_losses: Losses are added to the gradients in backward, so that a script that knows nothing of them
            trains balanced. If False the script adds `moeify.aux_loss(model)`.
        capacity_factor: In training an expert takes at most factor * tokens * top_k / experts; None for no limit.
        eval_capacity_factor: The same in evaluation. Expert choice, which needs one, takes `capacity_factor` for None.
        drop_order: Who keeps a full expert: "position" (first come), "probability", "random", "batch_prioritized".
            "probability" and "batch_prioritized" let later tokens push out earlier ones.
        jitter: In training the router's input is multiplied by U[1-jitter, 1+jitter].
        expert_dropout: Dropout inside the experts, in training; None keeps what the dense FFN had.
        groups: "sigmoid" only: groups of experts that the choice is limited to `groups_kept` of.
        groups_kept: "sigmoid" only.
        routed_scale: "sigmoid" only: the weights are multiplied by it.
        bias_rate: "sigmoid" only: step of the selection bias per optimizer step; 0 leaves the bias as it is.
        slots: "soft" only: slots of each expert.
        vocabulary: "hash" only: number of token ids.

    Raises:
        ConfigError: a value out of range; the message names the field.
    """

    experts: int
    top_k: int
    method: str = "copy"
    renormalize: bool = True
    aux_loss: float = 0.01
    seed: int = 0
    router: str = "softmax"
    balance: str = "topk"
    normalize_topk: bool = False
    balance_level: str = "batch"
    z_loss: float = 0.0
    attach_losses: bool = False
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    drop_order: str = "position"
    jitter: float = 0.0
    expert_dropout: float | None = None
    groups: int = 1
    groups_kept: int = 1
    routed_scale: float = 1.0
    bias_rate: float = 0.0
    slots: int = 1
    vocabulary: int | None = None
    granularity: int = 1
    shared_experts: int = 0
    share: float = 0.5
    noise_std: float = 0.02

    def __post_init__(self) -> None:
        self._check_types()
        if self.experts < 1:
            raise ConfigError(f"experts is {self.experts}: at least 1 is needed")
        if self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}: each token must visit at least 1 expert")
        if self.top_k > self.experts:
            raise ConfigError(f"top_k is {self.top_k} but there are only {self.experts} experts: lower top_k")
        self._check_words()
        self._check_numbers()
        self._check_router()
        self._check_method()

    def _check_types(self) -> None:
        kinds = {"int": Integral, "float": Real, "bool": bool, "str": str}
        for name, field in type(self).__dataclass_fields__.items():
            value, (kind, _, optional) = getattr(self, name), str(field.type).partition(" | ")
            right = isinstance(value, kinds[kind]) and (kind == "bool" or not isinstance(value, bool))
            if not right and not (optional and value is None):
                raise ConfigError(f"{name} is {value!r}: expected {kind}{' or None' if optional else ''}")

    def _check_words(self) -> None:
        for field, known in (
            ("method", METHODS),
            ("router", ROUTERS),
            ("balance", BALANCES),
            ("balance_level", LEVELS),
            ("drop_order", DROP_ORDERS),
        ):
            if getattr(self, field) not in known:
                raise ConfigError(f"{field} is {getattr(self, field)!r}: expected one of {', '.join(known)}")

    def _check_numbers(self) -> None:
        for field in ("aux_loss", "z_loss", "bias_rate", "routed_scale", "noise_std"):
            value = getattr(self, field)
            if not 0 <= value < math.inf:
                raise ConfigError(f"{field} is {value}: expected a number that is not negative")
        for field in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{field} is {value}: expected a positive number, or None for no limit")
        for field in ("jitter", "expert_dropout"):
            value = getattr(self, field)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{field} is {value}: expected a number from 0 to below 1")

    def _check_router(self) -> None:
        """Check what one router needs, and that its options are not given to another."""
        wanted = {"gshard": 2, "hash": 1}.get(self.router, self.top_k)
        if self.top_k != wanted:
            raise ConfigError(f"top_k is {self.top_k}: the router {self.router!r} takes {wanted}")
        if self.router == "expert_choice" and self.capacity_factor is None:
            raise ConfigError("capacity_factor is None: expert choice needs one, the paper's is 1 per visited expert")
        if self.router == "hash" and not (self.vocabulary and self.vocabulary > 0):
            raise ConfigError(f"vocabulary is {self.vocabulary}: the router 'hash' needs the number of token ids")
        if self.slots < 1:
            raise ConfigError(f"slots is {self.slots}: each expert needs at least 1")
        if self.groups < 1 or self.experts % self.groups or not 1 <= self.groups_kept <= self.groups:
            raise ConfigError(
                f"groups is {self.groups} and groups_kept {self.groups_kept}: expected a divisor of {self.experts} "
                "experts, and no more kept than there are"
            )
        if self.top_k > self.groups_kept * (self.experts // self.groups):
            raise ConfigError(f"top_k is {self.top_k}: more than the experts in {self.groups_kept} groups")
        self._check_strangers()

    def _check_method(self) -> None:
        if self.granularity < 1:
            raise ConfigError(f"granularity is {self.granularity}: each FFN is cut into at least 1 shard")
        if self.experts % (self.granularity * self.groups):
            what = f"{self.groups} groups of whole FFNs" if self.groups > 1 else "whole FFNs"
            raise ConfigError(f"granularity is {self.granularity}: {self.experts} experts do not make up {what}")
        if self.top_k % self.granularity:
            raise ConfigError(f"top_k is {self.top_k}: with granularity {self.granularity} choose a multiple of it")
        if self.shared_experts < 0:
            raise ConfigError(f"shared_experts is {self.shared_experts}: expected a number that is not negative")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share is {self.share}: expected a number from 0 to 1")
        for field, methods in (("share", ("noise", "drop")), ("noise_std", ("noise",))):
            if self.method not in methods and getattr(self, field) != type(self).__dataclass_fields__[field].default:
                wanted = " or ".join(map(repr, methods))
                raise ConfigError(f"{field} is for the method {wanted}, and this one is {self.method!r}: leave it out")

    def _check_strangers(self) -> None:
        owners = {"groups": "sigmoid", "groups_kept": "sigmoid", "routed_scale": "sigmoid", "bias_rate": "sigmoid"}
        defaults = type(self).__dataclass_fields__
        for field, owner in {**owners, "slots": "soft", "vocabulary": "hash"}.items():
            if self.router != owner and getattr(self, field) != defaults[field].default:
                raise ConfigError(f"{field} is for the router {owner!r}, and this one is {self.router!r}: leave it out")

    @property
    def exact(self) -> bool:
        """Whether the converted model must compute what the dense one did, in evaluation."""
        sums_to_one = self.renormalize and self.routed_scale == 1 and self.eval_capacity_factor is None
        return self.method == "copy" and (
            (self.router in {"softmax", "gshard", "noisy_topk", "sigmoid"} and sums_to_one)
            or (self.router == "hash" and self.eval_capacity_factor is None)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    @classmethod
    def switch(cls, experts: int, **changes: Any) -> MoEConfig:
        """Switch Transformer (Fedus et al. 2021, arXiv:2101.03961).

        Top-1 weighted by its probability among all experts, jitter 1e-2, balancing loss 1e-2 in each layer, capacity
        factor 1.25 in training and 2 in evaluation (the paper tries 1, 1.25 and 2; its code evaluates with 2). For
        fine-tuning the paper sets dropout 0.4 inside the experts: `expert_dropout=0.4`.
        """
        paper = {"top_k": 1, "renormalize": False, "jitter": 1e-2, "aux_loss": 1e-2, "balance": "first_choice"}
        return cls._preset(experts, paper, {"capacity_factor": 1.25, "eval_capacity_factor": 2.0}, changes)

    @classmethod
    def gshard(cls, experts: int, **changes: Any) -> MoEConfig:
        """GShard (Lepikhin et al. 2020, arXiv:2006.16668).

        Top-2, the second at random with probability min(1, 2*g2), a loss that counts first choices. Expert capacity
        2*tokens/experts in training and evaluation, which is factor 1 here (`moeify.routing.capacity`). The paper does
        not print the loss's coefficient; 1e-2 is that of its code.
        """
        paper = {"top_k": 2, "router": "gshard", "aux_loss": 1e-2, "balance": "first_choice"}
        return cls._preset(experts, paper, {"capacity_factor": 1.0, "eval_capacity_factor": 1.0}, changes)

    @classmethod
    def st_moe(cls, experts: int, **changes: Any) -> MoEConfig:
        """ST-MoE (Zoph et al. 2022, arXiv:2202.08906).

        Top-2, balancing loss 1e-2 on first choices, z-loss 1e-3, capacity factor 1.25 in training and 2 in evaluation.
        Those factors leave out top_k as GShard's do, so they are 0.625 and 1 here.
        """
        paper = {"top_k": 2, "aux_loss": 1e-2, "z_loss": 1e-3, "balance": "first_choice"}
        return cls._preset(experts, paper, {"capacity_factor": 0.625, "eval_capacity_factor": 1.0}, changes)

    @classmethod
    def noisy_topk(cls, experts: int, top_k: int = 4, **changes: Any) -> MoEConfig:
        """Noisy top-k gating (Shazeer et al. 2017, arXiv:1701.06538).

        Learned noise, softmax after the selection, importance and load losses of 0.1 each, k = 4 for flat mixtures.
        """
        paper = {"top_k": top_k, "router": "noisy_topk", "aux_loss": 0.1, "balance": "cv2"}
        return cls._preset(experts, paper, {}, changes)

    @classmethod
    def mixtral(cls, experts: int = 8, top_k: int = 2, **changes: Any) -> MoEConfig:
        """Mixtral (Jiang et al. 2024, arXiv:2401.04088): top-2 of 8, softmax over the chosen, no token dropped.

        The paper states no loss; 1e-3, on the scale that is k when balanced, is transformers' `router_aux_loss_coef`.
        """
        return cls._preset(experts, {"top_k": top_k, "aux_loss": 1e-3}, {}, changes)

    @classmethod
    def deepseek_v3(cls, experts: int = 256, top_k: int = 8, **changes: Any) -> MoEConfig:
        """DeepSeek-V3 (arXiv:2412.19437): sigmoid scores, a selection bias instead of a strong loss.

        4 of 8 groups, weights scaled by 2.5, bias rate 1e-3 (the paper: 0 for the last 3% of training), sequence loss
        1e-4. The scale belongs to training from scratch next to a shared expert (`shared_experts=1`): give
        `routed_scale=1.0` to convert a dense model exactly. With few experts, give `groups=1, groups_kept=1`.
        """
        paper = {"top_k": top_k, "router": "sigmoid", "aux_loss": 1e-4, "balance": "deepseek", "bias_rate": 1e-3}
        return cls._preset(experts, paper, {"groups": 8, "groups_kept": 4, "routed_scale": 2.5}, changes)

    @classmethod
    def expert_choice(cls, experts: int, top_k: int = 2, **changes: Any) -> MoEConfig:
        """Expert choice (Zhou et al. 2022, arXiv:2202.09368): each expert takes its most probable tokens; no loss.

        The paper's capacity factor 2 is `top_k=2` here with factor 1: a token visits 2 experts on average.
        """
        paper = {"top_k": top_k, "router": "expert_choice", "aux_loss": 0.0}
        return cls._preset(experts, paper, {"capacity_factor": 1.0}, changes)

    @classmethod
    def dropless(cls, experts: int, top_k: int = 1, **changes: Any) -> MoEConfig:
        """MegaBlocks (Gale et al. 2022, arXiv:2211.15841): no capacity, no dropped token.

        Weights are the probabilities among all experts, as in Switch; the loss of 0.1 is its code's default, on the
        scale that is 1 when balanced.
        """
        paper = {"top_k": top_k, "renormalize": False, "aux_loss": 0.1, "normalize_topk": True}
        return cls._preset(experts, paper, {}, changes)

    @classmethod
    def _preset(cls, experts: int, paper: Fields, more: Fields, changes: Fields) -> MoEConfig:
        return cls(experts=experts, **{**paper, **more, **changes})
