"""Numbers in texts are those of records: changed ones, unknown ones and old records are told."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from sweeps import claims
from sweeps.claims import ClaimError, filled, last_change, stale, unclaimed, written

RECORD = {
    "summary": {"a": {"time": 0.6149, "bytes": 1234567, "rows": [3.25]}},
    "date": "2026-01-01",
    "machine": "2 cores (X), 3 GiB",
    "code": ["code"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "x.json").write_text(json.dumps(RECORD))
    return tmp_path


def test_every_text_says_what_the_records_say() -> None:
    assert list(claims.faults()) == []


def test_every_row_of_the_readme_says_when_and_where() -> None:
    section = (claims.ROOT / "README.md").read_text().partition("\n## Numbers\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 5
    for row in rows:
        *_, measured, where = row.strip("| ").split(" | ")
        used = {file for _, file, _ in claims.CLAIM.findall(measured)}
        assert {f"{file}#{name}" for file in used for name in ("date", "machine")} == {
            f"{file}#{name}" for _, file, name in claims.CLAIM.findall(where)
        }, row


@pytest.mark.parametrize(
    ("name", "said", "right"),
    [
        ("a.time", "0.7", "0.6"), ("a.time", "9.99", "0.61"), ("a.time", "1e-3", "6e-1"),
        ("a.time", "1.00e2", "6.15e-1"), ("a.bytes", "1", "1234567"), ("a.bytes", "1,000", "1,234,567"),
        ("a.rows.0", "1.0", "3.2"),
        ("machine", "here", "2 cores (X), 3 GiB"), ("date", "2025-12-31", "2026-01-01"),
    ],
)  # fmt: skip
def test_a_claim_is_written_in_the_form_of_the_text(folder: Path, name: str, said: str, right: str) -> None:
    text = f"| [{said}](x.json#{name}) of it, [see](x.md#a) |\n"
    assert filled(text, folder) == text.replace(said, right, 1)


def test_powers_of_ten_are_short() -> None:
    assert (written(2.04e-6, "1.0e-6"), written(3e12, "1e5")) == ("2.0e-6", "3e12")


@pytest.mark.parametrize(
    ("link", "why"),
    [
        ("x.json#a.none", "no number a.none"),
        ("x.json#a.rows.1", "no number a.rows.1"),
        ("x.json#a", "no number a"),
        ("y.json#a", "no record"),
    ],
)
def test_a_claim_of_nothing_is_an_error(folder: Path, link: str, why: str) -> None:
    with pytest.raises(ClaimError, match=why):
        filled(f"[1]({link})", folder)


def test_numbers_of_no_record_are_found() -> None:
    row = "| 8 experts, top-2 | [0.61](x.json#a) of int4, {} ([page](x.md)) |"
    assert unclaimed(row.format("nothing")) == []
    assert unclaimed(row.format("0.5 GiB and 1e-5")) == ["0.5", "1e-5"]
    assert unclaimed("Measured on 2 cores.") == ["2"]


def test_a_changed_number_a_hand_written_one_and_an_unknown_one_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "ROOT", folder)
    monkeypatch.setattr(claims, "records", list)
    page = folder / "README.md"
    page.write_text("# x\n\n## Numbers\n\n| a | [0.62](x.json#a.time) and 7 |\n\n## Limits\n\n8\n")
    found = "\n".join(claims.faults())
    assert "[0.62]" in found and "[0.61]" in found and "7 in 'Numbers'" in found and "8 in" not in found
    assert claims.main([]) == 0 and "[0.61]" in page.read_text()
    page.write_text("[0.61](x.json#a.none)")
    assert [line for line in claims.faults() if "no number" in line] and claims.main(["--check"]) == 1


def git(folder: Path, *arguments: str, when: str = "2026-01-01") -> None:
    date = f"{when}T12:00:00+00:00"
    who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a"}
    dates = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
    subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True, env=os.environ | who | dates)


def test_a_record_that_is_older_than_its_code_by_more_than_the_limit_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "ROOT", folder)
    record, code = folder / "x.json", folder / "code"
    assert stale(record) is None, "without git nothing is judged"
    git(folder, "init")
    for when, told in (("2026-01-31", None), ("2026-02-01", "x.json is of 2026-01-01, and code changed on 2026-02-01")):
        code.write_text(when)
        git(folder, "add", ".")
        git(folder, "commit", "-m", "x", when=when)
        assert (stale(record) or "").partition(":")[0] == (told or "")
    git(folder, "commit", "--allow-empty", "-m", "x", when="2027-01-01")
    assert str(last_change(folder, "code")) == "2026-02-01"
    (folder / ".git/shallow").write_text(
        subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    )
    assert stale(record) is None, "of a shallow clone nothing is judged"


def test_every_record_says_which_code_it_speaks_of() -> None:
    for path in claims.records():
        paths = claims.CODE.get(path.relative_to(claims.ROOT).as_posix()) or json.loads(path.read_text())["code"]
        assert paths and all((claims.ROOT / each).exists() for each in paths), path
    assert len(claims.records()) > 10
