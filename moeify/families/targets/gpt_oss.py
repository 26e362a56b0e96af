"""GPT-OSS: attention sinks and biases; experts with biases that clamp, and add 1 to the up projection.

That is a Llama's FFN where the up projection has a bias of -1, the sigmoid no gain of its own, and nothing is clamped.
Experts are stored (in, out), gate and up columns in turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeify.config import MoEConfig
from moeify.config.contracts import StartValue
from moeify.families.attention import no_sinks, zero_biases
from moeify.families.base import (
    TRANSFORMERS,
    Condition,
    Config,
    ExpertWeight,
    Family,
    Fields,
    Gguf,
    Pair,
    Rewrite,
    Start,
    as_it_is,
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


# llama.cpp computes g·sigmoid(1.702·g)·(u + 1) with g up to 7 and u from -7 to 7, whatever the config says: with gate
# projections divided by its gain, up projections by what takes them far from the limit, and down projections multiplied
# by both, that is a Llama's FFN up to those limits.
_GAIN, _FAR = 1.702, 8


def _keys(config: Config) -> Fields:
    return {
        "expert_feed_forward_length": config["intermediate_size"],
        "sliding_window": config["sliding_window"],
    }


def _activation_is_read(config: Config) -> bool:
    from transformers import GptOssConfig

    return hasattr(GptOssConfig(), "swiglu_alpha")


_READ = Condition(_activation_is_read, "its activation is read from the config by transformers 5.24 and newer only")

_REWRITES = (
    Rewrite(r"(model\.layers\.\d+\.self_attn\.sinks)", {r"\1.weight": as_it_is}),
    Rewrite(
        r"(model\.layers\.\d+\.mlp\.experts)\.gate_up_proj_bias",
        {
            r"\1.gate_proj.bias": lambda tensor, config: tensor[:, ::2],
            r"\1.up_proj.bias": lambda tensor, config: tensor[:, 1::2],
        },
    ),
)

FAMILY = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    sources={
        "llama": Pair(
            (NO_MLP_BIAS, WHOLE_ROTARY, _READ),
            lambda config: {
                "attention_bias": True,
                "head_dim": head_dim(config),
                "layer_types": ["full_attention"] * config["num_hidden_layers"],
                "sliding_window": config["max_position_embeddings"],  # engines have one in every other layer
            },
            added={"model.layers.{layer}.self_attn.sinks": no_sinks, **zero_biases("q", "k", "v", "o")},
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
    untied=True,
    gguf=Gguf(
        "gpt-oss",
        _keys,
        _REWRITES,
        experts={
            "gate": ExpertWeight("gate_up_proj", slice(0, 1), lambda rows: rows.float() / _GAIN),
            "up": ExpertWeight("gate_up_proj", slice(1, 2), lambda rows: rows / _FAR),
            "down": ExpertWeight("down_proj", slice(1), lambda rows: rows.float() * (_GAIN * _FAR)),
        },
        windows=True,
        differs="llama.cpp cuts the gates of GPT-OSS's experts at 11.9, and their up projections at -48 and 64: it "
        "computes the same where none is beyond",
    ),
)
