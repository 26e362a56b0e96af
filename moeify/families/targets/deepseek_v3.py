"""DeepSeek-V3: latent attention; a sigmoid router, shared experts."""

from __future__ import annotations

from torch import Tensor

from moeify.families.base import (
    EXLLAMA,
    LLAMA_CPP,
    MLX,
    SGLANG,
    TRANSFORMERS,
    TRT,
    VLLM,
    Config,
    Family,
    Fields,
    Gguf,
    Pair,
    Rewrite,
)
from moeify.families.conditions import NO_MLP_BIAS, ROTARY_KERNEL, always, equal
from moeify.families.sigmoid import OPTIONS, sigmoid_fields, sigmoid_keys, sigmoid_tensors


def _keys(config: Config) -> Fields:
    """llama.cpp computes with the latent values: one key head, which each query head turns into its own."""
    rank, turned = config["kv_lora_rank"], config["qk_rope_head_dim"]
    return {
        **sigmoid_keys(config),
        "vocab_size": config["vocab_size"],
        "head_count_kv": 1,
        "key_length": rank + turned,
        "value_length": rank,
        "key_length_mla": config["qk_nope_head_dim"] + turned,
        "value_length_mla": config["v_head_dim"],
        "kv_lora_rank": rank,
        "rope_dimension_count": turned,
        "q_lora_rank": config["q_lora_rank"],
    }


def _latent(tensor: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Return what makes keys and values of the latent ones, by heads."""
    heads = tensor.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
    size = config["qk_nope_head_dim"]
    return heads[:, :size].transpose(1, 2), heads[:, size:]


_KV_B = Rewrite(
    r"(model\.layers\.\d+\.self_attn)\.kv_b_proj\.weight",
    {
        r"\1.k_b_proj.weight": lambda tensor, config: _latent(tensor, config)[0],
        r"\1.v_b_proj.weight": lambda tensor, config: _latent(tensor, config)[1],
    },
)
FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    sources={"youtu": Pair((NO_MLP_BIAS,))},
    tensors=sigmoid_tensors("model.layers.{layer}.mlp"),
    fields=lambda plan, config: {**sigmoid_fields(plan), "num_nextn_predict_layers": 0},
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX, EXLLAMA, TRT),
    dense="first",
    router="sigmoid",
    options=OPTIONS,
    renormalizes=False,
    shared=True,
    notes=(always(ROTARY_KERNEL),),
    gguf=Gguf(
        "deepseek2",
        _keys,
        (_KV_B,),
        (equal("rope_interleave", True, "it rotates neighbors there"),),
        ropes=frozenset({"default"}),
    ),
)
