"""Block-sparse topology of expert computation: the MegaBlocks formulation (arXiv:2211.15841) without its padding.

With rows sorted by expert, the hidden activation of all experts is one matrix of S rows and E*F columns, of which each
row fills only its expert's F columns. Cut in blocks, the filled ones are known from the routing alone. Blocks at the
end of an expert's rows or columns are partial: they are stored whole, zero outside, so no dense matrix is ever padded.

Shape legend: S sorted rows, E experts, F columns per expert, B block size, L block rows (a bound known on the host),
C block columns of all experts, G = cdiv(F, B) block columns of one expert, N = L * G blocks. A trailing 1 is plus one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.kernels.layout import tile_map


@dataclass(frozen=True)
class BlockTopology:
    """Where the filled blocks are, by block row and, transposed, by block column. All metadata is int32.

    Block n holds block row `row_N[n]` and block column `column_N[n]`; both are -1 for a dead block, past the last one.
    The order is by row, then column: block row l owns blocks l*G .. l*G + G - 1.

    Attributes:
        offsets_E1: (E + 1,), expert e owns sorted rows offsets[e] .. offsets[e + 1] - 1.
        expert_L: (L,), the expert of each block row; -1 where dead.
        first_row_L: (L,), the first sorted row of each block row.
        row_N: (N,), block row of each block.
        column_N: (N,), block column of each block: e*G + j covers columns e*F + j*B .. e*F + min(j*B + B, F) - 1.
        offsets_C1: (C + 1,), the transposed index: block column c owns entries offsets[c] .. offsets[c + 1] - 1.
        block_N: (N,), the block of each entry of the transposed index, by column, then row; -1 past the last.
        rows: S.
        columns: F.
        block: B.
    """

    offsets_E1: Tensor
    expert_L: Tensor
    first_row_L: Tensor
    row_N: Tensor
    column_N: Tensor
    offsets_C1: Tensor
    block_N: Tensor
    rows: int
    columns: int
    block: int

    @property
    def experts(self) -> int:
        """E."""
        return self.offsets_E1.shape[0] - 1

    @property
    def expert_blocks(self) -> int:
        """G, block columns of one expert."""
        return -(-self.columns // self.block)

    @property
    def blocks(self) -> int:
        """N, blocks including dead ones."""
        return self.row_N.shape[0]


def block_topology(offsets_E1: Tensor, rows: int, columns: int, block: int) -> BlockTopology:
    """Build the topology on the device of the offsets, without waiting for it.

    The transposed index needs no sort, because an expert's block rows are contiguous: its i-th block row holds the i-th
    entry of each of its columns.

    Args:
        offsets_E1: int32 (E + 1,), as `RoutingLayout.offsets_E1`.
        rows: S, all choices, those with an id outside [0, E) too.
        columns: F, any number.
        block: B, a power of two of at least 16.

    Raises:
        ValueError: The hardware cannot multiply blocks of this size.
    """
    if block < 16 or block & (block - 1):
        raise ValueError(f"block is {block}: expected a power of two of at least 16; use 16, 32, 64 or 128")
    tiles = tile_map(offsets_E1, rows, block)
    group, block_rows = -(-columns // block), tiles.expert_L.shape[0]
    live_L1 = tiles.expert_L[:, None] >= 0
    j_G = torch.arange(group, dtype=torch.int32, device=offsets_E1.device)
    l_L1 = torch.arange(block_rows, dtype=torch.int32, device=offsets_E1.device)[:, None]
    row_LG = torch.where(live_L1, l_L1, -1).expand(-1, group)
    column_LG = torch.where(live_L1, tiles.expert_L[:, None] * group + j_G, -1)
    tiles_E = (offsets_E1.diff() + block - 1) // block
    first_E = tiles_E.cumsum(0, dtype=torch.int32) - tiles_E
    offsets_C = tiles_E.repeat_interleave(group, output_size=tiles_E.shape[0] * group).cumsum(0, dtype=torch.int32)
    offsets_C1 = torch.cat([offsets_C.new_zeros(1), offsets_C])
    # Entry of (block row l, column j of expert e): where the column starts, plus l's place among e's block rows.
    e_L = tiles.expert_L.clamp(min=0).long()
    entry_LG = offsets_C1[(e_L[:, None] * group + j_G)] + (l_L1 - first_E[e_L][:, None])
    spare = block_rows * group
    block_N = torch.full((spare + 1,), -1, dtype=torch.int32, device=offsets_E1.device)
    entry_LG = torch.where(live_L1, entry_LG, spare)
    block_N = block_N.scatter(0, entry_LG.reshape(-1).long(), (l_L1 * group + j_G).reshape(-1))
    return BlockTopology(
        offsets_E1, tiles.expert_L, tiles.row_L, row_LG.reshape(-1).contiguous(), column_LG.reshape(-1),
        offsets_C1, block_N[:spare], rows, columns, block,
    )  # fmt: skip
