from __future__ import annotations

import json
import re

from sweeps.granularity import CUTS, RECORD
from sweeps.models import DOCS


def test_the_record_shows_no_jump_and_the_page_says_what_it_holds() -> None:
    record = json.loads(RECORD.read_text())
    dense, moe = record["dense"], record["moe"]
    assert set(moe) == {str(cut) for cut in CUTS} and record["tokens"] > 500
    worst = max(abs(value / dense - 1) for value in moe.values())
    assert worst < 1e-4
    said = re.search(r"perplexity ([\d.]+) to ([\d.e-]+)\s", (DOCS / "verify.md").read_text())
    assert said is not None and float(said[1]) == round(dense, 2) and worst <= float(said[2]) <= 1e-4
