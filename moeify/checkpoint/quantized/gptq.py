"""GPTQ: integers of 2, 3, 4 or 8 bits, packed along the inputs; a scale and a zero point for each group of inputs.

As AutoGPTQ and GPTQModel store it: `qweight` (in · bits / 32, out), `scales` (groups, out), `qzeros` (groups,
out · bits / 32), `g_idx` (in): the group of each input. Zero points are stored less 1, modulo 2 to the number of bits,
unless checkpoint_format is "gptq_v2".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeify.checkpoint.quantized.base import Parts, Weight, four_bits, group_count, packed_size, unpack, whole_number

if TYPE_CHECKING:
    import torch

_FORMATS = {"gptq": 1, "gptq_v2": 0, None: 1}  # with what is added to zero points
_BITS = (2, 3, 4, 8)


def find_weight(parts: Parts) -> Weight | None:
    """Return the weight that the tensors of a module make up; None if they are not quantized.

    Raises:
        ValueError: They do not fit each other.
    """
    if "qweight" not in parts.infos:
        return None
    bits, form = whole_number(parts.settings, "bits", *_BITS), parts.settings.get("checkpoint_format")
    if not isinstance(form, str | None) or form not in _FORMATS:
        raise ValueError(f"quantization_config has checkpoint_format = {form!r:.40}, expected gptq or gptq_v2")
    words, rows = parts.sizes("qweight")
    columns = parts.info("g_idx").shape[0] if "g_idx" in parts.infos else words * 32 // bits
    group = whole_number(parts.settings, "group_size")
    groups = group_count(columns, group)
    parts.check("qweight", packed_size(columns, bits), rows)
    parts.check("scales", groups, rows)
    parts.check("qzeros", groups, packed_size(rows, bits))
    replaces = ("qweight", "scales", "qzeros", *({"g_idx"} & parts.infos.keys()))
    numbers = four_bits(
        lambda: _symmetric(parts, columns, group, _FORMATS[form]),
        lambda: parts.read("scales").t(),
        (rows, columns),
        groups,
    )
    compute = lambda: _values(parts, bits, group, _FORMATS[form])  # noqa: E731
    return Weight((rows, columns), replaces, compute, numbers if bits == 4 else None)


def _symmetric(parts: Parts, columns: int, group: int, offset: int) -> torch.Tensor:
    """Return the integers (out, in) of a weight whose groups lie in order and have their zero in the middle.

    Raises:
        ValueError: They do not.
    """
    import torch

    zeros = unpack(parts.read("qzeros"), 4, parts.sizes("scales")[1], 1).int() + offset
    places = torch.arange(columns) // (columns if group == -1 else group)
    if "g_idx" in parts.infos and not torch.equal(parts.read("g_idx").long(), places):
        raise ValueError("its g_idx mixes the groups: pass dequantize=True too, to quantize it anew")
    if not bool((zeros == 8).all()):
        raise ValueError("it has zero points besides 8: pass dequantize=True too, to quantize it anew")
    return unpack(parts.read("qweight"), 4, columns, 0).t()


def _values(parts: Parts, bits: int, group: int, offset: int) -> torch.Tensor:
    import torch

    words, scales = parts.read("qweight"), parts.read("scales").float()
    zeros = (unpack(parts.read("qzeros"), bits, scales.shape[1], 1).int() + offset) & ((1 << bits) - 1)
    if "g_idx" in parts.infos:
        of = parts.read("g_idx").long()
    else:
        columns = len(words) * 32 // bits
        of = torch.arange(columns) // (columns if group == -1 else group)
    if not 0 <= int(of.min()) <= int(of.max()) < len(scales):
        raise ValueError(f"g_idx has a group that is none of the {len(scales)}")
    values = unpack(words, bits, len(of), 0).float()  # (in, out)
    for number in range(len(scales)):
        chosen = of == number
        values[chosen] = (values[chosen] - zeros[number]) * scales[number]
    return values.t().contiguous()
