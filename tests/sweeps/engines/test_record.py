"""How a run is judged, and what the record holds."""

from __future__ import annotations

import pytest

from moeify.families.table import FAMILIES
from sweeps.dense_sources import SOURCES, config_of
from sweeps.engines.faults import FAULTS, fault_of
from sweeps.engines.record import REFUSED, RIGHT, UNKNOWN, WRONG, Row, judged, read_record

PLACE = ("llama", "mixtral", "vLLM")


def told(copies: float | None, differing: float | None) -> dict[str, dict[str, object]]:
    return {"copies": {"version": "1", "difference": copies}, "differing": {"version": "1", "difference": differing}}


@pytest.mark.parametrize(
    ("copies", "differing", "result", "why"),
    [(1e-6, 1e-5, RIGHT, ""), (1e-6, 2e-5, WRONG, ""), (0.3, 1e-6, WRONG, ""), (None, 1e-6, WRONG, "NaN")],
)
def test_numbers_are_right_up_to_a_limit(copies: float, differing: float, result: str, why: str) -> None:
    assert judged(PLACE, told(copies, differing)) == Row(*PLACE, "1", result, copies, differing, why)


@pytest.mark.parametrize(
    ("said", "result"),
    [
        ("ValueError: Model type x not supported.", UNKNOWN),
        ("ValueError: XForCausalLM is not supported", UNKNOWN),
        ("Model architectures ['XForCausalLM'] are not supported for now", UNKNOWN),
        ("ValueError: Head dimension 64 is not supported by MLA.", REFUSED),
        ("ValueError: Missing 2 parameters", REFUSED),
    ],
)
def test_a_refusal_is_told(said: str, result: str) -> None:
    assert judged(PLACE, {**told(1e-6, 1e-6), "differing": {"error": said}}).result == result


def test_every_row_is_of_a_pair_that_exists() -> None:
    for row in read_record():
        assert SOURCES[row.source][0] in FAMILIES[row.family].sources


def test_every_wrong_row_says_where_the_engine_goes_wrong() -> None:
    wrong = [row for row in read_record() if row.result in {WRONG, REFUSED}]
    assert [row for row in wrong if fault_of(row) is None] == []
    needed = {fault_of(row) for row in wrong}
    assert [fault for fault in FAULTS if fault not in needed] == [], "these are mended: take them out"


def test_an_engine_that_computes_something_else_is_left_out_of_a_family_or_users_are_told() -> None:
    wrong = [row for row in read_record() if row.result == WRONG]
    assert wrong
    assert [row for row in wrong if row.engine in FAMILIES[row.family].engines and not is_told(row)] == []


def is_told(row: Row) -> bool:
    family, config = FAMILIES[row.family], config_of(row.source).to_dict()
    notes = [note.otherwise for note in family.notes if not note.holds(config)]
    return any(row.engine in note for note in notes) or bool(family.sources[config["model_type"]].only)
