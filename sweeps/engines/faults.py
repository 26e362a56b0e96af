"""Where in an engine it goes wrong, found by reading it after a run."""

from __future__ import annotations

from dataclasses import dataclass

from moeify.families.base import LLAMA_CPP, MLX, VLLM
from sweeps.engines.record import GENAI, OLDER, REFUSED, SGLANG_LOADER, WRONG, Row


@dataclass(frozen=True)
class Fault:
    """A fault of an engine.

    Attributes:
        engine: Its name.
        families: Where it shows.
        where: File and line in the release that was run.
        what: What it does there.
        sources: Where it shows; none means all.
    """

    engine: str
    families: tuple[str, ...]
    where: str
    what: str
    sources: tuple[str, ...] = ()


_SCALED = ("llama llama3 rope", "phi3 longrope", "smollm3 longrope")
_WINDOWS = ("mistral window", "ministral window", "phi3 window")
_MIXED = ("qwen2 window", "ministral mixed")
_HEAD_DIM = ("llama head_dim", "gemma head_dim")
_BIASES = ("llama attention_bias", "granite bias")
_GEMMA = ("gemma", "gemma head_dim")
_NO_HEAD_DIM = "has heads of hidden_size / num_attention_heads"
_SILU = "has SiLU in its experts, whatever the config says"
FAULTS = (
    Fault(
        SGLANG_LOADER,
        ("deepseek_v3",),
        "srt/layers/rotary_embedding/factory.py:478",
        "builds no rotary positions without scaling on a CPU",
    ),
    Fault(
        OLDER,
        ("gpt_oss",),
        "transformers/models/gpt_oss/modeling_gpt_oss.py:78",
        "has the activation's constants in its code (5.24 reads them from the config)",
    ),
    Fault(
        LLAMA_CPP,
        ("granitemoehybrid",),
        "conversion/granite.py:515",
        "its converter says that a model with state-space layers has no rotary positions, whatever "
        "`position_embedding_type` says (a .gguf file by moeify says it)",
        ("granitemoehybrid",),
    ),
    Fault(
        VLLM,
        ("lfm2_moe",),
        "vllm/model_executor/models/lfm2_moe.py:257",
        "gives its rotary kernel for CPUs queries with a dimension for heads, which that turns otherwise",
    ),
    Fault(
        VLLM,
        ("deepseek_v3",),
        "vllm/model_executor/layers/mla.py:228",
        "gives its rotary kernel for CPUs queries with a dimension for heads, which that turns otherwise",
    ),
    Fault(
        VLLM,
        ("cohere2_moe",),
        "vllm/model_executor/models/cohere2_moe.py:213",
        "has windows that are one token wider than transformers', as for dense Cohere 2",
    ),
    Fault(
        VLLM,
        ("qwen3_5_moe_text",),
        "vllm/model_executor/layers/mamba/ops/cpu/gdn_attention.py:158",
        "has linear attention in bfloat16 only on CPUs",
    ),
    Fault(
        VLLM,
        ("nemotron_h",),
        "vllm/model_executor/layers/fused_moe/config.py:1403",
        "has experts without a gate on GPUs only",
    ),
    Fault(VLLM, ("gpt_oss",), "vllm/model_executor/models/gpt_oss.py:117", "wants YaRN's factor in every GPT-OSS"),
    Fault(MLX, ("gpt_oss",), "mlx_lm/models/gpt_oss.py:180", "wants a layer with a window in every GPT-OSS"),
    Fault(
        LLAMA_CPP,
        ("gpt_oss",),
        "src/llama-graph.cpp:2292",
        "has the activation's constants in its code (a .gguf file by moeify is scaled to them)",
    ),
    Fault(
        LLAMA_CPP,
        ("hunyuan_v1_moe",),
        "conversion/hunyuan.py:33",
        "its converter takes HunYuan's own tokenizer and lists only, which vLLM does not (a .gguf file by moeify runs)",
    ),
    Fault(LLAMA_CPP, ("dots1",), "src/models/dots1.cpp:34", "has as many key heads as query heads"),
    Fault(
        LLAMA_CPP,
        ("gemma4_text",),
        "ggml/src/ggml-cpu/vec.h:1446",
        "looks GELU up in a table of float16 on CPUs, as for the dense model",
    ),
    Fault(
        SGLANG_LOADER,
        ("gemma4_text",),
        "srt/utils/hf_transformers/config.py:311",
        "has heads of two sizes for a Gemma 4 that sees, not for its text part alone",
    ),
    Fault(
        LLAMA_CPP, ("mixtral",), "src/models/llama.cpp:119", "has no windows, as for dense Mistral and Phi", _WINDOWS
    ),
    Fault(
        LLAMA_CPP,
        ("mixtral", "glm4_moe"),
        "conversion/base.py:1484",
        "writes no factors of the rotary frequencies (a .gguf file by moeify has them for Mixtral)",
        ("phi3 longrope", "smollm3 longrope"),
    ),
    Fault(
        LLAMA_CPP,
        ("granitemoe", "granitemoeshared"),
        "conversion/llama.py:326",
        "makes factors of the rotary frequencies, which its GGUF library does not take for Granite's MoE",
        ("llama llama3 rope",),
    ),
    Fault(
        LLAMA_CPP,
        ("glm4_moe", "solar_open", "ernie4_5_moe"),
        "conversion/base.py:1490",
        "writes factors of the rotary frequencies for some formats only",
        ("llama llama3 rope",),
    ),
    Fault(LLAMA_CPP, ("granitemoe_swa",), "conversion/granite.py:33", _NO_HEAD_DIM, _HEAD_DIM),
    Fault(LLAMA_CPP, ("mixtral",), "src/models/llama.cpp:210", _SILU, _GEMMA),
    Fault(LLAMA_CPP, ("granitemoe",), "src/models/granite.cpp:286", _SILU, _GEMMA),
    Fault(MLX, ("mixtral",), "mlx_lm/models/mixtral.py:176", "has no windows, as for dense Mistral", _WINDOWS),
    Fault(MLX, ("mixtral",), "mlx_lm/models/mixtral.py:59", "ignores rope scaling", _SCALED),
    Fault(MLX, ("mixtral",), "mlx_lm/models/mixtral.py:40", _NO_HEAD_DIM, _HEAD_DIM),
    Fault(MLX, ("mixtral", "granitemoe"), "mlx_lm/models/switch_layers.py:179", _SILU, _GEMMA),
    Fault(MLX, ("glm4_moe", "solar_open"), "mlx_lm/models/glm4_moe.py:68", "ignores rope scaling", _SCALED),
    Fault(MLX, ("ernie4_5_moe",), "mlx_lm/models/ernie4_5_moe.py:58", "ignores rope scaling", _SCALED),
    Fault(MLX, ("dots1",), "mlx_lm/models/dots1.py:267", "has no windows", ("qwen3 window",)),
    Fault(
        VLLM,
        ("granitemoe", "granitemoeshared", "granitemoe_swa"),
        "vllm/model_executor/models/granitemoe.py:184",
        "drops attention biases",
        _BIASES,
    ),
    Fault(VLLM, ("granitemoe_swa",), "vllm/model_executor/models/granitemoe.py:170", _NO_HEAD_DIM, _HEAD_DIM),
    Fault(VLLM, ("mixtral",), "vllm/model_executor/models/mixtral.py:118", _SILU, _GEMMA),
    Fault(VLLM, ("granitemoe",), "vllm/model_executor/models/granitemoe.py:106", _SILU, _GEMMA),
    Fault(VLLM, ("qwen2_moe",), "vllm/engine/arg_utils.py:2251", "has windows in all layers here or in none", _MIXED),
    Fault(
        OLDER,
        ("qwen2_moe",),
        "transformers/models/qwen2_moe/modeling_qwen2_moe.py:1019",
        "has windows in all layers here or in none",
        _MIXED,
    ),
    Fault(
        SGLANG_LOADER,
        ("granitemoe", "granitemoeshared"),
        "srt/models/granitemoe.py:252",
        "drops attention biases",
        _BIASES,
    ),
    Fault(SGLANG_LOADER, ("mixtral",), "srt/models/mixtral.py:151", _NO_HEAD_DIM, _HEAD_DIM),
    Fault(
        GENAI,
        ("deepseek_v3", "gemma4_text"),
        "genai_config.json: head_size",
        "has one size for the keys and values of all layers",
    ),
    Fault(
        GENAI,
        ("granitemoehybrid", "lfm2_moe", "nemotron_h", "qwen3_5_moe_text"),
        "moeify/export/capture/interface.py:204",
        "the export has inputs for keys and values, none for the states of linear attention",
    ),
    Fault(LLAMA_CPP, ("qwen2_moe",), "src/models/qwen2moe.cpp:139", "does not renormalize (`norm_topk_prob`)"),
    Fault(MLX, ("qwen2_moe",), "mlx_lm/models/qwen2_moe.py:135", "does not renormalize (`norm_topk_prob`)"),
)


def fault_of(row: Row) -> Fault | None:
    """Return what is known of a row that is wrong."""
    if row.result not in {WRONG, REFUSED}:
        return None
    alike = (fault for fault in FAULTS if fault.engine == row.engine and row.family in fault.families)
    return next((fault for fault in alike if not fault.sources or row.source in fault.sources), None)
