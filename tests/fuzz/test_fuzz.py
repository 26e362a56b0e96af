"""Some hundred damaged inputs, always the same: none crashes moeify, hangs it, or leaves anything behind."""

from __future__ import annotations

import pytest

from tests.fuzz.__main__ import prepare
from tests.fuzz.groups import GROUPS
from tests.fuzz.run import run_case

SEED = 0


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    prepare()


@pytest.mark.parametrize("group", GROUPS)
def test_no_damage_is_more_than_one_line(group: str) -> None:
    results = [run_case(SEED, group, number)[0] for number in range(GROUPS[group].quick)]
    wrong = [result.report(SEED) for result in results if not result.right]
    assert not wrong, f"{len(wrong)} of {len(results)}\n" + "\n".join(wrong)
