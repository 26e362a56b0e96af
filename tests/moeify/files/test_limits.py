from __future__ import annotations

from pathlib import Path

from moeify.files import limits

TEXT = Path(limits.__file__).read_text()


def test_every_limit_is_a_number_with_the_largest_real_case_beside_it() -> None:
    lines = [line for line in TEXT.splitlines() if line[:1].isupper()]
    names = [line.split(" = ")[0] for line in lines]
    assert names == [name for name in vars(limits) if name.isupper()] and len(names) > 10
    for line in lines:
        value, _, comment = line.partition(" = ")[2].partition("  # ")
        assert int(value) > 0 and ("largest" in comment or "17" in comment or "512" in comment), line
