from __future__ import annotations

import pytest
import torch

from moeify.kernels import memory


@pytest.mark.parametrize("limit", [0, 1 << 40])
@pytest.mark.parametrize("unused", [[], [slice(0, 1), slice(2, 3)], [slice(0, 3)]])
def test_unused_ranges_are_zero_and_the_rest_can_be_written(
    monkeypatch: pytest.MonkeyPatch, limit: int, unused: list[slice]
) -> None:
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


def test_no_rows() -> None:
    assert memory.room((0, 4), torch.float32, torch.device("cpu"), [slice(0, 0)]).shape == (0, 4)
