"""FlexOlmo: norms after attention and FFN, and of whole q and k."""

from moeify.families.base import TRANSFORMERS, VLLM, Family, Pair, expert_size, experts, router
from moeify.families.conditions import FULL_ATTENTION, PLAIN_HEAD_DIM

_MOE = "model.layers.{layer}.mlp"

FAMILY = Family(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    sources={
        "olmo2": Pair((PLAIN_HEAD_DIM,)),
        "olmo3": Pair(
            (FULL_ATTENTION, PLAIN_HEAD_DIM),
            lambda config: {"rope_parameters": config["rope_parameters"]["full_attention"]},
        ),
    },
    tensors={f"{_MOE}.gate.weight": router, **experts(_MOE)},
    fields=lambda plan, config: {
        "num_experts": plan.config.experts,
        "num_experts_per_tok": plan.config.top_k,
        "intermediate_size": expert_size(plan),
        "norm_topk_prob": plan.config.renormalize,
        "router_aux_loss_coef": plan.config.aux_loss,
        "output_router_logits": False,
    },
    engines=(TRANSFORMERS, VLLM),
    renormalizes=False,
)
