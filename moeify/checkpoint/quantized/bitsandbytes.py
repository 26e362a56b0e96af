"""bitsandbytes: 4-bit numbers of a table (nf4, fp4) with a scale for each block, or 8-bit integers with one a row.

As `QuantState.as_dict(packed=True)` stores 4 bits: `weight` holds two numbers a byte, the first in the high half;
`quant_map` is the table, `absmax` the scales. With double quantization the scales are places in a table of their own
(`nested_quant_map`), times a scale for each block of them (`nested_absmax`), plus an offset. What is no tensor is JSON,
as bytes. 8 bits: `weight` times `SCB` (the largest of each row) / 127.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from moeify.checkpoint.quantized.base import Parts, Weight
from moeify.files.json_text import JsonObject, parse_json

if TYPE_CHECKING:
    import torch

_STATE, _STATE_BYTES = "weight.quant_state.bitsandbytes__", 10_000
_TABLES = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
_EIGHT_BITS = 127


def find_weight(parts: Parts) -> Weight | None:
    """Return the weight that the tensors of a module make up; None if they are not quantized.

    Raises:
        ValueError: They do not fit each other.
    """
    if "SCB" in parts.infos and "weight" in parts.infos:
        return _eight_bits(parts)
    state = next((name for name in parts.infos if name.startswith(_STATE)), None)
    return None if state is None else _four_bits(parts, state)


def _eight_bits(parts: Parts) -> Weight:
    import torch

    rows, columns = parts.sizes("weight")
    parts.check("SCB", rows)
    if parts.info("weight").dtype != "I8":
        raise ValueError(f"weight is {parts.info('weight').dtype}, expected I8")
    form = "weight_format"
    if form in parts.infos and torch.count_nonzero(parts.read(form)):
        raise ValueError(f"{form} is not 0, that of rows: save it with a newer bitsandbytes")

    def values() -> torch.Tensor:
        return parts.read("weight").float().mul_(parts.read("SCB").float()[:, None] / _EIGHT_BITS)

    return Weight((rows, columns), ("weight", "SCB", *({form} & parts.infos.keys())), values)


def _four_bits(parts: Parts, state: str) -> Weight:
    if parts.info(state).nbytes > _STATE_BYTES:
        raise ValueError(f"{state} holds {parts.info(state).nbytes} bytes, expected at most {_STATE_BYTES}")
    parsed = parse_json(bytes(parts.read(state).tolist()))
    entries = parsed if isinstance(parsed, dict) else {}
    match entries:
        case {"blocksize": int(block), "shape": [int(rows), int(columns)]} if min(block, rows, columns) > 0:
            shape = (rows, columns)
        case _:
            raise ValueError(f"{state} says neither blocksize nor the shape of a matrix")
    blocks = -(-rows * columns // block)
    parts.check("weight.quant_map", 16)
    parts.check("weight.absmax", blocks)
    if prod(parts.info("weight").shape) * 2 < rows * columns or parts.info("weight").dtype != "U8":
        raise ValueError(f"weight holds {parts.info('weight').nbytes} bytes, expected two numbers of {shape} in each")
    if parts.info("weight.absmax").dtype == "U8":
        nested = entries.get("nested_blocksize"), entries.get("nested_offset")
        if not isinstance(nested[0], int) or nested[0] < 1 or not isinstance(nested[1], int | float):
            raise ValueError(f"{state} has nested_blocksize and nested_offset {nested}, expected numbers")
        parts.check("weight.nested_quant_map", 256)
        parts.check("weight.nested_absmax", -(-blocks // nested[0]))
    replaces = ("weight", state, *(name for name in _TABLES if name in parts.infos))
    return Weight(shape, replaces, lambda: _values(parts, entries, block, shape))


def _values(parts: Parts, state: JsonObject, block: int, shape: tuple[int, int]) -> torch.Tensor:
    import torch

    table, scales = parts.read("weight.quant_map").float(), parts.read("weight.absmax")
    if scales.dtype == torch.uint8:
        nested = parts.read("weight.nested_quant_map").float()[scales.long()]
        scales = _by_block(nested, parts.read("weight.nested_absmax").float(), int(state["nested_blocksize"]))
        scales = scales + float(state["nested_offset"])
    packed = parts.read("weight").flatten()
    places = torch.stack([packed >> 4, packed & 15], 1).flatten()[: prod(shape)]
    return _by_block(table[places.int()], scales.float(), block).reshape(shape)


def _by_block(values: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """Multiply a vector by a scale for each block of it; the last one may be cut."""
    whole = len(values) // block
    values[: whole * block].view(whole, block).mul_(scales[:whole, None])
    values[whole * block :].mul_(scales[whole:])
    return values
