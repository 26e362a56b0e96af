"""FP8 weights with scales: for blocks (DeepSeek-V3, Qwen3-FP8), for rows (FBGEMM), or for the whole (ModelOpt).

The weight is value times scale, whatever the scale is called: `weight_scale_inv` is the inverse of what the weight was
multiplied by (DeepSeek-V3's `weight_dequant`, transformers' `Fp8Dequantize`).
"""

from __future__ import annotations

from moeify.checkpoint.quantized.base import Parts, Weight, check_scale, eight_bits, scaled

EIGHT_BITS = {"F8_E4M3", "F8_E5M2"}
SCALES = ("weight_scale_inv", "weight_scale")
OF_ACTIVATIONS = {"input_scale", "input_scale_ub", "activation_scale", "input_zero_point", "input_global_scale"}


def find_weight(parts: Parts) -> Weight | None:
    """Return the weight that the tensors of a module make up; None if they are not quantized.

    Raises:
        ValueError: They do not fit each other.
    """
    name = next((name for name in SCALES if name in parts.infos), None)
    if name is None or "weight" not in parts.infos or parts.info("weight").dtype not in EIGHT_BITS:
        return None
    block = block_size(parts.settings.get("weight_block_size"))
    shape = parts.sizes("weight")
    scale = parts.info(name).shape
    block = None if scale in {(), (1,), shape[:1], (shape[0], 1)} else block
    check_scale(name, shape, scale, block)
    replaces = ("weight", name, *sorted(OF_ACTIVATIONS & parts.infos.keys()))
    numbers = eight_bits(lambda: parts.read("weight"), lambda: parts.read(name), shape, scale, block)
    known = numbers if parts.info("weight").dtype == "F8_E4M3" else None
    return Weight(shape, replaces, lambda: scaled(parts.read("weight"), parts.read(name), block), known)


def block_size(entry: object) -> tuple[int, int] | None:
    """Return the rows and columns of a block, as a config has them.

    Raises:
        ValueError: They are not two whole numbers.
    """
    match entry:
        case None:
            return None
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise ValueError(f"quantization_config has blocks of {entry!r:.40}, expected two whole numbers")
