"""The driver tells apart what its children may do."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import driver
from tests.fuzz.driver import execute

Program = Callable[[], object]


def ends(code: int) -> Program:
    def program() -> None:
        print("result")
        print("Error: \udcff", file=sys.stderr)
        sys.exit(code)

    return program


def crashes() -> None:
    raise ZeroDivisionError


def answers() -> None:
    print(input("Do you wish to run the custom code? [y/N] "))


def waits() -> None:
    time.sleep(3600)


def spins() -> None:
    while True:
        pass


def swallows() -> None:
    held = bytearray(300_000_000)
    print(len(held))


@pytest.fixture
def outcome_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Program], driver.Outcome]:
    def run(program: Program) -> driver.Outcome:
        monkeypatch.setattr(driver, "main", lambda *_, **__: program())
        return execute(["inspect"], tmp_path)

    return run


def test_exit_codes_and_what_is_said(outcome_of: Callable[[Program], driver.Outcome]) -> None:
    for code in (0, 1, 2):
        outcome = outcome_of(ends(code))
        assert (outcome.code, outcome.signal) == (code, 0)
        assert (outcome.stdout, outcome.stderr) == ("result\n", "Error: \\udcff\n")
    assert outcome_of(lambda: None).code == 0


def test_an_exception_that_comes_out_is_a_traceback(outcome_of: Callable[[Program], driver.Outcome]) -> None:
    outcome = outcome_of(crashes)
    assert outcome.code == 97 and "Traceback" in outcome.stderr and "ZeroDivisionError" in outcome.stderr


def test_every_question_is_answered_with_yes(outcome_of: Callable[[Program], driver.Outcome]) -> None:
    assert outcome_of(answers).stdout.endswith("y\n")


def test_what_kills_is_told(outcome_of: Callable[[Program], driver.Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "SECONDS", 1)
    monkeypatch.setattr(driver, "IDLE_SECONDS", 0.3)
    assert outcome_of(waits).signal == signal.SIGALRM
    assert outcome_of(spins).signal == signal.SIGXCPU
    assert outcome_of(lambda: os.kill(os.getpid(), signal.SIGBUS)).signal == signal.SIGBUS


def test_memory_above_the_start_is_counted(outcome_of: Callable[[Program], driver.Outcome]) -> None:
    little, much = outcome_of(lambda: None), outcome_of(swallows)
    assert 250e6 < much.growth - little.growth < 400e6
    assert outcome_of(lambda: bytearray(2**43)).code == 97  # more addresses than a child may have
