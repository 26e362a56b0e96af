from __future__ import annotations

from benchmarks.record import read
from sweeps.granularity import CUTS, RECORD


def test_the_record_shows_no_jump() -> None:
    found = read(RECORD).summary
    dense, moe = found["dense"], found["moe"]
    assert set(moe) == {str(cut) for cut in CUTS} and found["tokens"] > 500
    assert 0 < found["jump"] == max(abs(value / dense - 1) for value in moe.values()) < 1e-6
