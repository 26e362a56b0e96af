"""The settings of the papers, as classmethods of `MoEConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

P = TypeVar("P", bound="Presets")


class Presets:
    """Presets. Each takes any field as a keyword, to change it.

    A mapping for `router` changes single options of the preset's router: `router={"n_group": 1}`.
    """

    if TYPE_CHECKING:

        def __init__(self, **fields: Any) -> None: ...

    @classmethod
    def switch(cls: type[P], experts: int, **changes: Any) -> P:
        """Switch Transformer (Fedus et al. 2021, arXiv:2101.03961).

        Top-1 weighted by its probability among all experts, jitter 1e-2, balancing loss 1e-2 in each layer, capacity
        factor 1.25 in training and 2 in evaluation (the paper tries 1, 1.25 and 2; its code evaluates with 2). For
        fine-tuning the paper sets dropout 0.4 inside the experts: `expert_dropout=0.4`.
        """
        paper = {"top_k": 1, "renormalize": False, "jitter": 1e-2, "aux_loss": 1e-2, "balance": "first_choice"}
        return cls._preset(experts, {**paper, "capacity_factor": 1.25, "eval_capacity_factor": 2.0}, changes)

    @classmethod
    def gshard(cls: type[P], experts: int, **changes: Any) -> P:
        """GShard (Lepikhin et al. 2020, arXiv:2006.16668).

        Top-2, the second at random with probability min(1, 2*g2), a loss that counts first choices. Expert capacity
        2*tokens/experts in training and evaluation, which is factor 1 here (`moeify.routing.capacity`). The paper does
        not print the loss's coefficient; 1e-2 is that of its code.
        """
        paper = {"top_k": 2, "router": {"name": "gshard"}, "aux_loss": 1e-2, "balance": "first_choice"}
        return cls._preset(experts, {**paper, "capacity_factor": 1.0, "eval_capacity_factor": 1.0}, changes)

    @classmethod
    def st_moe(cls: type[P], experts: int, **changes: Any) -> P:
        """ST-MoE (Zoph et al. 2022, arXiv:2202.08906).

        Top-2, the second at random with probability min(1, 5*g2) (its code draws in evaluation too; here there is no
        chance then), loss 1e-2 on first choices, z-loss 1e-3, capacity factor 1.25 in training and 2 in evaluation.
        Those factors leave out top_k as GShard's do, so they are 0.625 and 1 here.
        """
        router = {"name": "gshard", "threshold": 0.2}
        paper = {"top_k": 2, "router": router, "aux_loss": 1e-2, "z_loss": 1e-3, "balance": "first_choice"}
        return cls._preset(experts, {**paper, "capacity_factor": 0.625, "eval_capacity_factor": 1.0}, changes)

    @classmethod
    def noisy_topk(cls: type[P], experts: int, top_k: int = 4, **changes: Any) -> P:
        """Noisy top-k gating (Shazeer et al. 2017, arXiv:1701.06538).

        Learned noise, softmax after the selection, importance and load losses of 0.1 each, k = 4 for flat mixtures.
        """
        paper = {"top_k": top_k, "router": {"name": "noisy_topk"}, "aux_loss": 0.1, "balance": "cv2"}
        return cls._preset(experts, paper, changes)

    @classmethod
    def mixtral(cls: type[P], experts: int = 8, top_k: int = 2, **changes: Any) -> P:
        """Mixtral (Jiang et al. 2024, arXiv:2401.04088): top-2 of 8, softmax over the chosen, no token dropped.

        The paper states no loss; 1e-3, on the scale that is k when balanced, is transformers' `router_aux_loss_coef`.
        Its loss is one over the tokens of all layers, which asks for less than the mean over layers here.
        """
        return cls._preset(experts, {"top_k": top_k, "aux_loss": 1e-3, "divide_loss_by_layers": True}, changes)

    @classmethod
    def deepseek_v3(cls: type[P], experts: int = 256, top_k: int = 8, **changes: Any) -> P:
        """DeepSeek-V3 (arXiv:2412.19437): sigmoid scores, a selection bias instead of a strong loss.

        4 of 8 groups, weights scaled by 2.5, bias rate 1e-3 (the paper: 0 for the last 3% of training), sequence loss
        1e-4. The scale belongs to training from scratch next to a shared expert (`shared_experts=1`): give
        `router={"routed_scaling_factor": 1.0}` to convert a dense model exactly. With few experts, give
        `router={"n_group": 1, "topk_group": 1}`.
        """
        options = {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "bias_rate": 1e-3}
        paper = {"top_k": top_k, "router": {"name": "sigmoid", **options}, "aux_loss": 1e-4, "balance": "deepseek"}
        return cls._preset(experts, paper, changes)

    @classmethod
    def expert_choice(cls: type[P], experts: int, top_k: int = 2, **changes: Any) -> P:
        """Expert choice (Zhou et al. 2022, arXiv:2202.09368): each expert takes its most probable tokens; no loss.

        The paper's capacity factor 2 is `top_k=2` here with factor 1: a token visits 2 experts on average.
        """
        paper = {"top_k": top_k, "router": {"name": "expert_choice"}, "capacity_factor": 1.0}
        return cls._preset(experts, paper, changes)

    @classmethod
    def dropless(cls: type[P], experts: int, top_k: int = 1, **changes: Any) -> P:
        """MegaBlocks (Gale et al. 2022, arXiv:2211.15841): no capacity, no dropped token.

        Weights are the probabilities among all experts, as in Switch; the loss of 0.1 is its code's default, on the
        scale that is 1 when balanced, and the mean over layers.
        """
        paper = {"top_k": top_k, "renormalize": False, "aux_loss": 0.1}
        return cls._preset(experts, {**paper, "divide_loss_by_top_k": True, "divide_loss_by_layers": True}, changes)

    @classmethod
    def _preset(cls: type[P], experts: int, paper: Mapping[str, Any], changes: Mapping[str, Any]) -> P:
        router = changes.get("router")
        if isinstance(router, Mapping) and "name" not in router:
            changes = {**changes, "router": {**paper.get("router", {}), **router}}
        return cls(experts=experts, **{**paper, **changes})


PRESETS = tuple(name for name in vars(Presets) if not name.startswith("_"))
