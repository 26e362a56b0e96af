from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from moeify.kernels import memory


@pytest.mark.parametrize("free", [0, 1 << 40])
@pytest.mark.parametrize("limit", [0, 1 << 40])
@pytest.mark.parametrize("unused", [[], [slice(0, 1), slice(2, 3)], [slice(0, 3)]])
def test_unused_ranges_are_zero_and_the_rest_can_be_written(
    monkeypatch: pytest.MonkeyPatch, limit: int, free: int, unused: list[slice]
) -> None:
    monkeypatch.setattr(memory, "free_in_large_blocks", lambda: free)
    monkeypatch.setattr(memory, "ALWAYS_MAPPED", limit)
    monkeypatch.setattr(memory, "MAPPED_IF_MOSTLY_UNUSED", limit)
    torch.empty(3, 5).fill_(torch.nan)  # what malloc is likely to hand out next
    out = memory.room((3, 5), torch.float32, torch.device("cpu"), unused)
    assert out.shape == (3, 5) and out.is_contiguous()
    assert all((out[rows] == 0).all() for rows in unused)
    out.fill_(1)
    assert out.sum() == 15


def test_mapped_memory_lives_as_long_as_the_tensor() -> None:
    size = memory.MAPPED_IF_MOSTLY_UNUSED + 1
    out = memory.room((size,), torch.uint8, torch.device("cpu"), [slice(0, size)])
    view = out[-10:]
    del out
    assert view.tolist() == [0] * 10


def test_large_blocks_are_those_of_two_mebibytes_and_more(tmp_path: Path) -> None:
    file = tmp_path / "buddyinfo"
    file.write_text(
        "Node 0, zone      DMA      1      0      0      0      0      0      0      0      1      1      3\n"
        "Node 1, zone   Normal 110435 189171 141584  65185  24110   6869   1636    319    113      2      0\n"
    )
    pages = 1 * 512 + 3 * 1024 + 2 * 512
    assert memory.free_in_large_blocks(file) == pages * mmap.PAGESIZE
    assert memory.free_in_large_blocks(tmp_path / "absent") == 0


def test_no_rows() -> None:
    assert memory.room((0, 4), torch.float32, torch.device("cpu"), [slice(0, 0)]).shape == (0, 4)
