"""Qwen3.5 MoE: linear and full attention in turns, in every layer one gated shared expert."""

from torch import Tensor, cat

from moeify.families.base import (
    EXLLAMA,
    LLAMA_CPP,
    SGLANG,
    TRANSFORMERS,
    TRT,
    VLLM,
    Condition,
    Config,
    Family,
    Fields,
    Gguf,
    Pair,
    Rewrite,
    experts,
    head_dim,
    qwen_fields,
    router,
)
from moeify.families.conditions import NO_ATTENTION_BIAS, always
from moeify.families.gated import gated_shared_expert, qwen_keys, shared_size
from moeify.families.hybrid import decay

_MOE = "model.layers.{layer}.mlp"


def _interval(config: Config) -> Fields:
    """Return how SGLang wants to be told which layers attend to all: by how many layers they are apart."""
    attends = [kind == "full_attention" for kind in config["layer_types"]]
    apart = attends.index(True) + 1 if any(attends) else 0
    regular = apart and all(is_so == (layer % apart == 0) for layer, is_so in enumerate(attends, 1))
    return {"full_attention_interval": apart} if regular else {}


def _keys(config: Config) -> Fields:
    """Return the keys of a GGUF file."""
    rope = config["rope_parameters"]
    return {
        **qwen_keys(config),
        "ssm_conv_kernel": config["linear_conv_kernel_dim"],
        "ssm_state_size": config["linear_key_head_dim"],
        "ssm_group_count": config["linear_num_key_heads"],
        "ssm_time_step_rank": config["linear_num_value_heads"],
        "ssm_inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
        "full_attention_interval": config["full_attention_interval"],
        "rope_dimension_count": int(head_dim(config) * rope.get("partial_rotary_factor", 0.25)),
        "rope_dimension_sections": [*rope.get("mrope_section", (11, 11, 10)), 0],  # of text each turns alike
    }


def _turns(tensor: Tensor, config: Config, size: int) -> Tensor:
    """Return rows of value heads with the first of every key head before the second ones, as llama.cpp repeats keys."""
    heads, shared = config["linear_num_value_heads"], config["linear_num_key_heads"]
    return tensor.reshape(shared, heads // shared, size, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def _values(tensor: Tensor, config: Config) -> Tensor:
    return _turns(tensor, config, config["linear_value_head_dim"])


def _last_values(tensor: Tensor, config: Config) -> Tensor:
    """Return queries and keys as they are, and value heads in llama.cpp's order."""
    size = 2 * config["linear_key_head_dim"] * config["linear_num_key_heads"]
    return cat([tensor[:size], _values(tensor[size:], config)])


_LINEAR = r"(model\.layers\.\d+\.linear_attn)"
_REWRITES = (
    Rewrite(rf"{_LINEAR}\.A_log", {r"\1.A_log": lambda tensor, config: _turns(decay(tensor), config, 1)}),
    Rewrite(rf"{_LINEAR}\.dt_bias", {r"\1.dt_proj.bias": lambda tensor, config: _turns(tensor, config, 1)}),
    Rewrite(
        rf"{_LINEAR}\.in_proj_(a|b)\.weight",
        {r"\1.in_proj_\2.weight": lambda tensor, config: _turns(tensor, config, 1)},
    ),
    Rewrite(rf"{_LINEAR}\.in_proj_z\.weight", {r"\1.in_proj_z.weight": _values}),
    Rewrite(rf"{_LINEAR}\.in_proj_qkv\.weight", {r"\1.in_proj_qkv.weight": _last_values}),
    Rewrite(
        rf"{_LINEAR}\.conv1d\.weight",
        {r"\1.conv1d.weight": lambda tensor, config: _last_values(tensor.squeeze(1), config)},
    ),
    Rewrite(
        rf"{_LINEAR}\.out_proj\.weight", {r"\1.out_proj.weight": lambda tensor, config: _values(tensor.T, config).T}
    ),
    Rewrite(  # a norm is one plus its weight, but for that of linear attention
        r"(model\.(?!.*linear_attn).*norm)\.weight", {r"\1.weight": lambda tensor, config: tensor.float() + 1}
    ),
)
_LLAMA_CPP = (
    NO_ATTENTION_BIAS,
    Condition(
        lambda config: config["linear_key_head_dim"] == config["linear_value_head_dim"],
        "keys and values of its linear attention have different sizes (linear_key_head_dim, linear_value_head_dim)",
    ),
    Condition(
        lambda config: "full_attention_interval" in config,
        "its layers with full attention are not equally far apart (layer_types)",
    ),
)

FAMILY = Family(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    sources={"qwen3_5_text": Pair()},
    tensors={f"{_MOE}.gate.weight": router, **experts(_MOE), **gated_shared_expert(_MOE)},
    fields=lambda plan, config: {
        **qwen_fields(plan),
        "shared_expert_intermediate_size": shared_size(plan),
        **_interval(config),
    },
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, EXLLAMA, TRT),
    shared=True,
    notes=(always("llama.cpp's converter needs --no-mtp for it: or write a .gguf file"),),
    gguf=Gguf("qwen35moe", _keys, _REWRITES, _LLAMA_CPP),
)
