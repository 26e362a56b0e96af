"""What an example measured is kept: the table of each seed in its README, and in JSON with what made it."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from examples import records, small_lm


def test_the_table_of_each_seed_is_kept_and_made_anew(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# An example\n")
    for seed, loss in ((0, 1.5), (1, 1.25), (0, 1.75)):
        args = argparse.Namespace(seed=seed, quick=False)
        small_lm.write_table(tmp_path, args, ["model", "loss"], [["dense", loss]])
    kept = json.loads((tmp_path / records.NAME).read_text())["seeds"]
    assert {seed: table["rows"] for seed, table in kept.items()} == {
        "0": [{"model": "dense", "loss": 1.75}],
        "1": [{"model": "dense", "loss": 1.25}],
    }
    assert kept["1"]["versions"]["moeify"] and kept["1"]["machine"]
    page = (tmp_path / "README.md").read_text()
    assert "| dense | 1.75 |" in page and "| dense | 1.25 |" in page and "1.5 |" not in page
    assert page.index("Seed 0") < page.index("Seed 1")


def test_the_numbers_of_a_statement_stand_in_the_page_that_it_links() -> None:
    page = records.ROOT / "examples" / "statements.md"
    rows = [line.split("|")[3] for line in page.read_text().splitlines() if line.startswith("|")][2:]
    checked = 0
    for cell in rows:
        (folder,) = re.findall(r"\]\((\w+)\)", cell)
        source = (page.parent / folder / "README.md").read_text()
        numbers = re.findall(r"\d+\.\d{2,}|\d+\.\d(?= (?:and|%))", cell)
        missing = [number for number in numbers if number not in source]
        assert not missing, f"{missing} do not stand in examples/{folder}/README.md"
        checked += len(numbers)
    assert checked > 20
