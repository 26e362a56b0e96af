"""GPT-OSS: attention sinks and biases; experts with biases that clamp, and add 1 to the up projection.

That is a Llama's FFN where the up projection has a bias of -1, the sigmoid no gain of its own, and nothing is clamped.
Experts are stored (in, out), gate and up columns in turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeify.config import MoEConfig
from moeify.config.contracts import StartValue
from moeify.families.attention import no_sinks
from moeify.families.base import (
    TRANSFORMERS,
    ExpertWeight,
    Family,
    Pair,
    Start,
    expert_size,
    head_dim,
    router,
)
from moeify.families.conditions import NO_MLP_BIAS, WHOLE_ROTARY
from moeify.plan import Site

_MOE = "model.layers.{layer}.mlp"
_NOTHING = 6e4  # a limit that no value reaches: the largest of float16 is 65504


def _in_turns(rows: Tensor) -> Tensor:
    """Store gate rows and then up rows (2I, H) as columns in turns (H, 2I)."""
    return rows.reshape(2, -1, rows.shape[1]).transpose(0, 1).flatten(0, 1).t()


def _zeros(size: str) -> Start:
    def start(name: str, site: Site, config: MoEConfig) -> StartValue:
        shape = (config.experts, site.hidden) if size == "hidden" else (config.experts,)
        return StartValue(shape, None, lambda: torch.zeros(shape), short=True)

    return start


def _up_biases(name: str, site: Site, config: MoEConfig) -> StartValue:
    each = torch.tensor([0.0, -1.0]).repeat(site.intermediate // config.granularity)
    shape = (config.experts, len(each))
    return StartValue(shape, None, lambda: each.expand(shape).clone(), short=True)


FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    sources={
        "llama": Pair(
            (NO_MLP_BIAS, WHOLE_ROTARY),
            lambda config: {
                "attention_bias": config.get("attention_bias", False),
                "head_dim": head_dim(config),
                "layer_types": ["full_attention"] * config["num_hidden_layers"],
            },
            added={"model.layers.{layer}.self_attn.sinks": no_sinks},
            only="transformers 5.24 alone reads the activation of GPT-OSS from the config: older ones and all other "
            "engines compute another. In 16 bits it loses digits: 1 is taken from the up projection, and added again",
        ),
    },
    tensors={
        f"{_MOE}.router.weight": router,
        f"{_MOE}.router.bias": _zeros("one"),
        f"{_MOE}.experts.gate_up_proj": ExpertWeight("gate_up_proj", slice(2), _in_turns),
        f"{_MOE}.experts.gate_up_proj_bias": _up_biases,
        f"{_MOE}.experts.down_proj": ExpertWeight("down_proj", slice(1), Tensor.t),
        f"{_MOE}.experts.down_proj_bias": _zeros("hidden"),
    },
    fields=lambda plan, config: {
        "num_local_experts": plan.config.experts,
        "num_experts_per_tok": plan.config.top_k,
        "intermediate_size": expert_size(plan),
        "swiglu_alpha": 1.0,
        "swiglu_limit": _NOTHING,
        "router_aux_loss_coef": plan.config.aux_loss,
        "output_router_logits": False,
    },
    engines=(TRANSFORMERS,),
)
