"""The page of balance is what its record says."""

from __future__ import annotations

from sweeps.balance.__main__ import PAGE, page, read_record


def test_the_page_is_what_the_record_says() -> None:
    assert PAGE.read_text() == page(*read_record()), "write it again: python -m sweeps.balance --page"
