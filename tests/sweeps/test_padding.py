from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moeify.kernels.layout import tile_map
from sweeps import padding
from sweeps.padding import capacity, padded, routings, tiled


def test_issued_products_are_those_of_the_tiles() -> None:
    counts, hidden, intermediate, block = [5, 0, 130, 16], 32, 24, 16
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tiles = int((tile_map(offsets, sum(counts), block).expert_L >= 0).sum())
    assert tiled(counts, 80, hidden, intermediate, block).flops == tiles * block * 2 * (
        hidden * 2 * intermediate + intermediate * hidden
    )


def test_padding_to_128_issues_more_and_moves_more() -> None:
    counts = [5, 0, 130, 16]
    ours, theirs = tiled(counts, 80, 32, 24, 16), padded(counts, 80, 32, 24)
    assert theirs.flops == (128 + 0 + 256 + 128) * 2 * 3 * 32 * 24
    assert ours.flops < theirs.flops and ours.bytes < theirs.bytes
    assert padded([128, 256], 192, 32, 24).flops == (128 + 256) * 2 * 3 * 32 * 24


def test_capacity_drops_what_does_not_fit() -> None:
    cost = capacity([90, 10, 0, 0], 50, 32, 24)
    assert cost.dropped == 90 - 32 and cost.flops == 4 * 32 * 2 * 3 * 32 * 24
    assert capacity([25, 25, 25, 25], 50, 32, 24).dropped == 0


def test_a_routing_deals_out_every_choice() -> None:
    for counts in routings(8, 1001).values():
        assert len(counts) == 8 and sum(counts) == 1001
    assert max(routings(8, 1001)["even"]) == 126


def test_the_table_of_the_page_is_that_of_the_program() -> None:
    assert padding.table(padding.HIDDEN, padding.INTERMEDIATE) in padding.PAGE.read_text(), "python -m sweeps.padding"


def test_the_table_is_written_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "kernels.md"
    page.write_text(f"before\n{padding.START}\nold\n{padding.END}\nafter\n")
    monkeypatch.setattr(padding, "PAGE", page)
    padding.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("\n| ") == 1 + 3 * len(padding.SHAPES)
    assert "| 128, 8, 32768 | even | 1.00 | 1.00 | 1.00 | 1.83 | 1.25 | 1.71 | 0% |" in text
