"""The words for quantizations in a `config.json`, known without loading what undoes them."""

from __future__ import annotations

from collections.abc import Mapping

from moeify.files.json_text import JsonObject

QUANTIZED_EXPERTS = "moeify_experts"  # of `moeify.quantize_experts`: the experts alone, as this library computes them
FIELDS = ("quantization_config", "compression_config")
# The file that knows a storage format, by quant_method.
MODULES = {
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "modelopt": "fp8",
    "bitsandbytes": "bitsandbytes",
    "gptq": "gptq",
    "awq": "awq",
    "compressed-tensors": "compressed_tensors",
}


def entry_of(config: Mapping[str, object]) -> JsonObject:
    """Return what a config says of its quantization, empty if it is not quantized."""
    entry = next((config[field] for field in FIELDS if config.get(field)), {})
    return entry if isinstance(entry, dict) else {"quant_method": entry}


def scheme_of(entry: Mapping[str, object]) -> str:
    """Return the name of a quantization."""
    older = "bitsandbytes" if entry.get("load_in_4bit") or entry.get("load_in_8bit") else "unnamed"
    return str(entry.get("quant_method", older))
