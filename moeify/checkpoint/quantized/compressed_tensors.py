"""compressed-tensors (llm-compressor): FP8 or integers as they are, or integers packed in words.

`weight` or `weight_packed` times `weight_scale`: one for the whole, for each row, for groups of inputs, or for blocks.
Packed integers have half their range added, and lie one after the other along the inputs; their zero points along the
outputs. `weight_shape` is the shape of the weight, and `weight_g_idx` the group of each input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeify.checkpoint.quantized.base import (
    Parts,
    Weight,
    check_scale,
    eight_bits,
    four_bits,
    packed_size,
    scaled,
    unpack,
    whole_number,
)
from moeify.checkpoint.quantized.fp8 import EIGHT_BITS, OF_ACTIVATIONS, block_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

_SCALE, _PACKED, _ZERO, _GROUPS = "weight_scale", "weight_packed", "weight_zero_point", "weight_g_idx"


def find_weight(parts: Parts) -> Weight | None:
    """Return the weight that the tensors of a module make up; None if they are not quantized.

    Raises:
        ValueError: They do not fit each other.
    """
    if _SCALE not in parts.infos:
        return None
    if _PACKED in parts.infos:
        return _packed(parts)
    if "weight" not in parts.infos or parts.info("weight").dtype not in {"I8", *EIGHT_BITS}:
        return None
    shape, scale = parts.sizes("weight"), parts.info(_SCALE).shape
    block = next(filter(None, (block_size(entry.get("block_structure")) for entry in _of_weights(parts))), None)
    block = None if scale in {(), (1,)} or scale[:1] == shape[:1] else block  # rows, or groups of inputs
    check_scale(_SCALE, shape, scale, block)
    if _ZERO in parts.infos:
        parts.check(_ZERO, *scale)

    def values() -> torch.Tensor:
        return _scaled(parts, parts.read("weight").float(), parts.read(_ZERO) if _ZERO in parts.infos else None, block)

    known = parts.info("weight").dtype == "F8_E4M3" and _ZERO not in parts.infos
    numbers = eight_bits(lambda: parts.read("weight"), lambda: parts.read(_SCALE), shape, scale, block)
    return Weight(shape, _all(parts, "weight"), values, numbers if known else None)


def _packed(parts: Parts) -> Weight:
    import torch

    if parts.info(_PACKED).dtype != "I32":
        raise ValueError(f"{_PACKED} is {parts.info(_PACKED).dtype}: only integers in words of 32 bits are known here")
    parts.check("weight_shape", 2)
    rows, columns = (int(size) for size in parts.read("weight_shape"))
    found, bits = parts.sizes(_PACKED), _bits(parts, columns)
    if found != (rows, packed_size(columns, bits)):
        raise ValueError(f"{_PACKED} has shape {list(found)}, which is not {bits} bits of {[rows, columns]}")
    groups = parts.info(_SCALE).shape[-1:]
    if _GROUPS not in parts.infos:
        check_scale(_SCALE, (rows, columns), parts.info(_SCALE).shape)
    if _ZERO in parts.infos and parts.info(_ZERO).dtype == "I32":
        parts.check(_ZERO, packed_size(rows, bits), *groups)

    def values() -> torch.Tensor:
        half, zeros = 1 << (bits - 1), parts.read(_ZERO) if _ZERO in parts.infos else None
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = unpack(zeros, bits, rows, 0).float() - half
        return _scaled(parts, unpack(parts.read(_PACKED), bits, columns, 1).float() - half, zeros, None)

    known = bits == 4 and not {_ZERO, _GROUPS} & parts.infos.keys()
    scale = parts.info(_SCALE).shape
    numbers = four_bits(
        lambda: unpack(parts.read(_PACKED), bits, columns, 1),
        lambda: parts.read(_SCALE),
        (rows, columns),
        scale[1] if len(scale) == 2 else 1,
    )
    return Weight((rows, columns), _all(parts, _PACKED), values, numbers if known else None)


def _scaled(
    parts: Parts, values: torch.Tensor, zeros: torch.Tensor | None, block: tuple[int, int] | None
) -> torch.Tensor:
    """Subtract the zero points and multiply by the scales: (q - z) · s = q · s - z · s."""
    import torch

    scale = parts.read(_SCALE).float()
    if _GROUPS in parts.infos and int((of := parts.read(_GROUPS).long()).min()) >= 0:  # -1: in order
        less = 0 if zeros is None else zeros[:, of]
        return values.sub_(less).mul_(scale[:, of])
    if zeros is not None:
        values -= scaled(torch.ones_like(values), zeros, block)
    return scaled(values, scale, block)


def _bits(parts: Parts, columns: int) -> int:
    """Return how many bits packed integers have: what their schemes say, and fits the shape."""
    bits = {whole_number(entry, "num_bits", *range(1, 9)) for entry in _of_weights(parts)}
    words = parts.sizes(_PACKED)[1]
    fitting = sorted(bit for bit in bits if packed_size(columns, bit) == words)
    if not fitting:
        raise ValueError(f"quantization_config has num_bits {sorted(bits)}, and {words} words do not hold {columns}")
    return fitting[0]


def _of_weights(parts: Parts) -> list[Mapping[str, object]]:
    """Return what the schemes of the checkpoint say of weights."""
    groups = parts.settings.get("config_groups")
    entries = groups.values() if isinstance(groups, dict) else ()
    return [entry["weights"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("weights"), dict)]


def _all(parts: Parts, values: str) -> tuple[str, ...]:
    names = {_SCALE, _ZERO, _GROUPS, "weight_shape", *OF_ACTIVATIONS} & parts.infos.keys()
    return (values, *sorted(names))
