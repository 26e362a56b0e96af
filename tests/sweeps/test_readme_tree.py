from __future__ import annotations

from pathlib import Path

import pytest

from sweeps import readme_tree
from sweeps.readme_tree import draw, summary


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("A rather short one.", "A rather short one"),
        ("A short one: with a colon, and a comma.\n\nMore.", "A short one: with a colon, and a comma"),
        ("Drop (Nakamura et al. 2025). More.", "Drop (Nakamura et al. 2025)"),
        ("A passage that runs over\ntwo lines.", "A passage that runs over two lines"),
        ("What this file is: " + "x" * 90, "What this file is"),
        ("What it is, in short: so, " + "x" * 90, "What it is, in short"),
        ("What it is: in short, " + "x" * 90, "What it is: in short"),
        ("What it is, in short, " + "x" * 90, "What it is, in short"),
        ("What this file is (a, " + "x" * 90 + ")", "What this file is"),
        ("What this file is: a (b), c (d), " + "x" * 90, "What this file is"),
    ],
)
def test_the_row_of_a_module_is_as_much_of_its_first_sentence_as_fits(
    tmp_path: Path, docstring: str, expected: str
) -> None:
    (tmp_path / "x.py").write_text(f'"""{docstring}"""\n')
    assert summary(tmp_path / "x.py") == expected


@pytest.mark.parametrize("source", ["", '"""Short."""', '"""' + "x" * 91 + '"""'])
def test_a_first_sentence_that_cannot_end_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr(readme_tree, "ROOT", tmp_path)
    (tmp_path / "x.py").write_text(source)
    with pytest.raises(ValueError, match=r"^x\.py: .* shorten it"):
        summary(tmp_path / "x.py")


def test_files_stand_below_their_folder() -> None:
    rows = draw().splitlines()
    start = next(number for number, row in enumerate(rows) if row.startswith("passes/"))
    inside = [row.split()[0] for row in rows[start + 1 :] if row.startswith("  ")]
    assert inside.index("matching/") < inside.index("operators.py") < inside.index("find_ffn.py")
    assert next(row for row in rows if "operators.py" in row).startswith("    operators.py ")
