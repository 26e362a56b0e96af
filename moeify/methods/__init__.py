"""Ways to make experts from a dense FFN: tensors in, tensors out.

Shape legend, here and in the methods: H hidden, I intermediate, J rows of the first weight (2I with a gate, gate rows
first), F width of one expert (I / granularity), E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DenseFFN:
    """The weights of one FFN, each stored (out, in).

    Attributes:
        up_JH: First projections, gate rows then up rows.
        down_HI: Projection back.
        up_bias_J: Bias of the first projections, or None.
        down_bias_H: Bias of the projection back, or None.
    """

    up_JH: Tensor
    down_HI: Tensor
    up_bias_J: Tensor | None
    down_bias_H: Tensor | None
