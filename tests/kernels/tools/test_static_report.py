from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moeify.kernels.gpu.tiles import Tile
from moeify.kernels.tools import cases, static_report
from moeify.kernels.tools.cases import CASES, Entry
from moeify.kernels.tools.static_analysis import Resources

PAGE = Path(__file__).resolve().parents[3] / "docs/kernels.md"
TILE = Tile(64, 64, 64, 4, 3)
GOOD = Resources(128, 0, 73728, True, 3, {"HGMMA": 16}, {"LDGSTS": 36}, 13.6)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Resources]:
    """What each architecture's `up` and plain product are said to use."""
    found = [GOOD, GOOD]

    def entries(architecture: str) -> Iterator[Entry]:
        cases = [case for name in ("up", "(dense)") for case in CASES if case.name == name]
        yield from (Entry(case, "bf16", TILE, one) for case, one in zip(cases, found, strict=True))

    monkeypatch.setattr(static_report, "entries", entries)
    return found


@pytest.mark.parametrize("architecture", static_report.ARCHITECTURES)
def test_the_page_has_a_row_for_every_tile_of_today(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its machine code says is not looked at again: that takes a compiler and minutes."""
    monkeypatch.setattr(cases, "measure", lambda *_: GOOD)
    report = PAGE.read_text().partition(static_report.START)[2].partition(static_report.END)[0]
    rows = report.partition(f"### {architecture}\n")[2].partition("\n### ")[0].splitlines()[3:]
    today = [static_report.row(entry).split(" | ")[:4] for entry in cases.entries(architecture)]
    assert [row.split(" | ")[:4] for row in rows if row] == today, "make kernels"


def test_tables_are_written_between_the_marks(compiled: list[Resources], tmp_path: Path) -> None:
    page = tmp_path / "kernels.md"
    page.write_text(f"before\n{static_report.START}\nold\n{static_report.END}\nafter\n")
    assert static_report.main([str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    line = "| up | 64x64x64 | 4 | 3 | 128 | 0 | 73728 | 3 | 16 HGMMA | 36 LDGSTS | 13.6 |"
    assert text.count(line) == len(static_report.ARCHITECTURES) == text.count("| (dense) |")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spill": 8}, "spills 8 bytes"),
        ({"fits": False}, "needs 73728 bytes"),
        ({"ctas": 0}, "leaves no room"),
        ({"tensor_ops": {}}, "uses no tensor cores"),
        ({"loop_ratio": 16.0}, "16.0 instructions per product, a plain product takes 13.6"),
    ],
)
def test_a_fault_is_said_and_is_the_exit_code(
    change: dict[str, object], fault: str, compiled: list[Resources], capsys: pytest.CaptureFixture[str]
) -> None:
    assert static_report.main(["--check", "sm_90"]) == 0
    compiled[0] = replace(GOOD, **change)  # type: ignore[arg-type]
    assert static_report.main(["--check", "sm_90"]) == 1
    assert "sm_90 up" in (error := capsys.readouterr().err) and fault in error
