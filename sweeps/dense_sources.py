"""Tiny random dense models of the types that native families are made from, in the corners of their configs.

Each is a model type, and fields of its config besides the sizes that all have. Names say what is special.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import nn

_LAYERS = 2
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": _LAYERS, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
          "max_position_embeddings": 512}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # fmt: skip
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1, 1.2, 1.3, 1.4],
             "long_factor": [2.0, 2.5, 3.0, 3.5], "factor": 8.0,
             "original_max_position_embeddings": 64}  # fmt: skip
_MIXED = ["sliding_attention", "full_attention"] * (_LAYERS // 2)
_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "layer_types": _MIXED}
_PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.7, "logits_scaling": 2.0}
# Four times as large, what vLLM's kernel has on CPUs: 512 latent dimensions and 64 that rotate.
_MLA = {"kv_lora_rank": 128, "q_lora_rank": 12, "qk_rope_head_dim": 16, "v_head_dim": 8, "qk_nope_head_dim": 8,
        "num_key_value_heads": 4, "tie_word_embeddings": False}  # fmt: skip
_LINEAR = {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
           "linear_num_value_heads": 4}  # fmt: skip

_HYBRID = {**_GRANITE, "num_local_experts": 0, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"],
           "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2,
           "position_embedding_type": "rope"}  # fmt: skip

_HYBRID_FFN = {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"], "head_dim": 8,
               "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
               "chunk_size": 8}  # fmt: skip
_LAYERS_WORDS = "vocab_size_per_layer_input"  # as many as the model has
_GEMMA4 = {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8, _LAYERS_WORDS: 0,
           "layer_types": _MIXED, "sliding_window": 5, "final_logit_softcapping": 30.0}  # fmt: skip

SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama head_dim": ("llama", {"head_dim": 16}),
    "llama attention_bias": ("llama", {"attention_bias": True}),
    "llama mlp_bias": ("llama", {"mlp_bias": True}),
    "llama llama3 rope": ("llama", {"rope_parameters": _LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral window": ("mistral", {"sliding_window": 5}),
    "granitemoehybrid": ("granitemoehybrid", _HYBRID),
    "granitemoehybrid NoPE": ("granitemoehybrid", {**_HYBRID, "position_embedding_type": None}),
    "granitemoehybrid attention": ("granitemoehybrid", {**_HYBRID, "layer_types": ["attention"] * _LAYERS}),
    "ministral": ("ministral", {"head_dim": 8, "layer_types": ["full_attention"] * _LAYERS}),
    "ministral window": ("ministral", {"head_dim": 8, "layer_types": ["sliding_attention"] * 2, "sliding_window": 5}),
    "ministral mixed": ("ministral", {"head_dim": 8, "layer_types": _MIXED, "sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 window": ("qwen2", _WINDOW),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 window": ("qwen3", {"head_dim": 16, **_WINDOW}),
    "qwen3 unused window": ("qwen3", {"head_dim": 16, **_WINDOW, "layer_types": ["full_attention"] * _LAYERS}),
    "qwen3 unread share": ("qwen3", {"head_dim": 16, "rope_parameters": _PARTIAL}),
    "seed_oss": ("seed_oss", {"head_dim": 8}),
    "seed_oss no bias": ("seed_oss", {"head_dim": 8, "attention_bias": False}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": _LAYERS + 1}),
    "smollm3 NoPE": ("smollm3", {"no_rope_layers": [1, 0]}),
    "smollm3 unused window": ("smollm3", {"no_rope_layers": [1, 1], "use_sliding_window": True, "sliding_window": 5}),
    "smollm3 longrope": ("smollm3", {"no_rope_layers": [1, 1], "rope_parameters": _LONGROPE}),
    "phi3": ("phi3", {}),
    "phi3 window": ("phi3", {"sliding_window": 5}),
    "phi3 longrope": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 64}),
    "phi3 partial": ("phi3", {"rope_parameters": _PARTIAL, "tie_word_embeddings": True}),
    "glm": ("glm", {"head_dim": 8}),
    "glm no bias": ("glm", {"head_dim": 16, "attention_bias": False, "tie_word_embeddings": True}),
    "granite": ("granite", _GRANITE),
    "granite bias": ("granite", {**_GRANITE, "attention_bias": True, "tie_word_embeddings": True}),
    "granite_swa": ("granite_swa", {**_GRANITE, "sliding_window": 5}),
    "ernie4_5": ("ernie4_5", {"head_dim": 8}),
    "ernie4_5 use_bias": ("ernie4_5", {"head_dim": 8, "use_bias": True}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 16}),
    "cohere": ("cohere", {}),
    "cohere qk norm": ("cohere", {"use_qk_norm": True}),
    "cohere2": ("cohere2", {"head_dim": 8, "layer_types": _MIXED, "sliding_window": 5}),
    "lfm2": ("lfm2", {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"] * (_LAYERS // 2)}),
    "youtu": ("youtu", _MLA),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"layer_types": ["full_attention"] * _LAYERS}),
    "olmo3 window": ("olmo3", {"layer_types": _MIXED, "sliding_window": 5}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma head_dim": ("gemma", {"head_dim": 16}),
    "gemma4_text": ("gemma4_text", _GEMMA4),
    "gemma4_text wide": ("gemma4_text", {**_GEMMA4, "use_double_wide_mlp": True}),
    "gemma4_text epsilon": ("gemma4_text", {**_GEMMA4, "rms_norm_eps": 1e-5}),
    "nemotron_h": ("nemotron_h", _HYBRID_FFN),
    "nemotron_h mlp_bias": ("nemotron_h", {**_HYBRID_FFN, "mlp_bias": True}),
    "qwen3_5_text": ("qwen3_5_text", {**_LINEAR, "layer_types": ["linear_attention", "full_attention"]}),
}  # fmt: skip


# Fields that are sizes, and lists that are as long as a head is wide.
_SIZE, _PER_DIMENSION = re.compile(r"_size|_dim|_rank|_d_head"), re.compile(r"(short|long)_factor")


def config_of(name: str, scale: int = 1, **fields: Any) -> Any:
    """Return the config of a model.

    Args:
        name: One of `SOURCES`.
        scale: What sizes are multiplied by: some engines have kernels for wider heads only.
        fields: Fields of the config that are otherwise.
    """
    model_type, special = SOURCES[name]
    sizes = {**_scaled({**_SIZES, **special}, scale), **fields}
    if _LAYERS_WORDS in sizes:
        sizes[_LAYERS_WORDS] = sizes["vocab_size"]
    return transformers.AutoConfig.for_model(model_type, **sizes)


def build(name: str, scale: int = 1, **fields: Any) -> nn.Module:
    """Build a model whose logits depend on every weight: norms and biases are random too. See `config_of`."""
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model: nn.Module = auto.from_config(config_of(name, scale, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15 / scale**0.5)
            else:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def _scaled(fields: dict[str, Any], scale: int) -> dict[str, Any]:
    return {name: _scaled_value(name, value, scale) for name, value in fields.items()}


def _scaled_value(name: str, value: Any, scale: int) -> Any:
    if isinstance(value, dict):
        return _scaled(value, scale)
    if _PER_DIMENSION.fullmatch(name):
        return [factor for factor in value for _ in range(scale)]
    return value * scale if _SIZE.search(name) and type(value) is int else value
