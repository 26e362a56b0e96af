"""AWQ: integers of 4 bits, packed along the outputs in an order of their own; a scale and a zero point for each group.

As AutoAWQ's "gemm" version stores it: `qweight` (in, out / 8), `qzeros` (groups, out / 8), `scales` (groups, out). The
eight numbers in a word are those of outputs 0, 2, 4, 6, 1, 3, 5, 7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeify.checkpoint.quantized.base import Parts, Weight, group_count, scaled, unpack, whole_number

if TYPE_CHECKING:
    import torch

_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word the number of each output is


def find_weight(parts: Parts) -> Weight | None:
    """Return the weight that the tensors of a module make up; None if they are not quantized.

    Raises:
        ValueError: They do not fit each other.
    """
    if "qweight" not in parts.infos:
        return None
    version = parts.settings.get("version", "gemm")
    if str(version).lower() != "gemm":
        raise ValueError(f"quantization_config has version = {version!r:.40}, expected gemm")
    whole_number(parts.settings, "bits", 4)
    columns, words = parts.sizes("qweight")
    group = whole_number(parts.settings, "group_size")
    groups = group_count(columns, group)
    parts.check("scales", groups, words * 8)
    parts.check("qzeros", groups, words)
    if columns % group:
        raise ValueError(f"{columns} inputs are not whole groups of {group}")
    return Weight((words * 8, columns), ("qweight", "scales", "qzeros"), lambda: _values(parts))


def _values(parts: Parts) -> torch.Tensor:
    values, zeros = (_in_order(parts.read(name)).t().float().contiguous() for name in ("qweight", "qzeros"))
    values.view(len(values), zeros.shape[1], -1).sub_(zeros[:, :, None])
    return scaled(values, parts.read("scales").t())


def _in_order(words: torch.Tensor) -> torch.Tensor:
    return unpack(words, 4, words.shape[1] * 8, 1).reshape(len(words), -1, 8)[:, :, _PLACES].flatten(1)
