"""One small model, converted in every way, and what the page makes of results."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from benchmarks.record import read
from moeify.measure import TOLERANCE
from sweeps.conversions import difference, same_tensors
from sweeps.exactness import PAGE, RESULTS, WAYS, check, isolated, page, results, summary


@pytest.fixture(autouse=True)
def logging_is_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def test_every_way_is_exact() -> None:
    result = check("gpt_neox")
    assert (result["ffns"], result["graph ffns"], result["auto"]) == (2, 2, "equal")
    assert all(result[way] <= TOLERANCE["float32"] for way in WAYS), result


def test_a_type_that_cannot_be_built_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model_type: str) -> None:
        raise ValueError("no\nsuch thing")

    monkeypatch.setattr("sweeps.exactness.small_model", broken)
    assert check("gpt_neox") == {"not built": "ValueError: no such thing"}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # from Python 3.12 on, of a process with threads
def test_a_crash_costs_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(model_type: str) -> None:
        raise SystemExit("over")

    monkeypatch.setattr("sweeps.exactness.check", crash)
    assert isolated("gpt_neox")["crash"].endswith("SystemExit: over\n")
    monkeypatch.setattr("sweeps.exactness.check", lambda _: {"in place": 0.0})
    assert isolated("gpt_neox") == {"in place": 0.0}


def test_differences_that_are_no_number_are_infinite() -> None:
    inf, nan = torch.inf, torch.nan
    masked = torch.tensor([-inf, 2.0, -4.0])
    assert difference([masked], [masked]) == 0
    assert difference([torch.tensor([-inf, 2.0, -3.0])], [masked]) == 0.25
    for wrong in ([0.0, 2.0, -4.0], [-inf, nan, -4.0]):
        assert difference([torch.tensor(wrong)], [masked]) == inf
    assert difference([torch.tensor([1])], [torch.tensor([2])]) == 1
    assert difference([], [masked]) == difference([masked[:2]], [masked]) == inf


def test_tensors_are_compared_bit_for_bit() -> None:
    state = {"a": torch.tensor([1.0, torch.nan]), "b": torch.tensor([3])}
    assert same_tensors(state, dict(state)) is None
    assert same_tensors(state, {"a": state["a"]}) == "1 names, extra b"
    assert same_tensors({**state, "a": state["a"] + 1e-6}, state) == "a (2,) torch.float32"
    assert same_tensors({**state, "b": state["b"].int()}, state) == "b (1,) torch.int32"


def test_the_page_is_what_the_record_says() -> None:
    assert PAGE.read_text() == page(results()), "write it again: python -m sweeps.exactness --page"
    assert read(RESULTS).summary == summary(results())


def test_the_page_counts_and_marks_what_is_above_the_limit() -> None:
    exact = {"ffns": 2, "in place": 1e-7, "stored": 1e-7, "streamed": 1e-7, "graph": "refused: no | FFN"}
    off = {"ffns": 1, "in place": 1e-3, "in place, float64": 1e-15}
    text = page({"a": exact, "b": off, "c": {"not built": "ImportError: x"}, "d": {"in place": "refused: no FFN"}})
    assert "4 types: 3 were built, 2 of them convert in place, 1 within the limit." in text
    assert "| a | 2 | 1.0e-07 | 1.0e-07 | 1.0e-07 | refused: no \\| FFN |" in text
    assert "| b | 1 | 1.0e-03 ✗ (float64: 1.0e-15) |" in text
    assert "| c | - | ImportError: x | | | |" in text
