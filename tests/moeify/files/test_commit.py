"""One output is stopped at every change of the disk: it is absent, the old one or the new one, and then whole.

The outputs are a folder, and a graph with its data file, each where nothing stands and over an old one.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from moeify.errors import CheckpointError
from moeify.files.staging import check_file, check_folder, staged_file, staged_folder
from tests.moeify.files.disk_faults import ERRORS, before_changes, count_changes, failing, killed_at, tree

OLD = {"config.json": b'{"model_type": "old"}', "model.safetensors": b"old", "tokenizer.json": b"old"}
NEW = {"config.json": b'{"model_type": "new"}', "model.safetensors": b"new"}


@dataclass(frozen=True)
class Case:
    """An output, how it is written, and what is there before and after."""

    pair: bool
    overwrite: bool

    @property
    def old(self) -> dict[str, bytes | str | None]:
        if not self.overwrite:
            return {}
        if self.pair:
            return {"out": b"old graph", "out.data": b"old data"}
        return {"out": None, **{f"out/{name}": data for name, data in OLD.items()}}

    @property
    def new(self) -> dict[str, bytes | str | None]:
        if self.pair:
            return {"out": b"new graph", "out.data": b"new data"}
        return {"out": None, **{f"out/{name}": data for name, data in NEW.items()}}

    def prepare(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for name, data in self.old.items():
            if isinstance(data, bytes):
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(data)

    @contextmanager
    def staged(self, folder: Path, *, resume: bool = False) -> Iterator[Path]:
        if self.pair:
            with staged_file(folder / "out", overwrite=self.overwrite, companion=".data") as path:
                path.write_bytes(b"new graph")
                Path(f"{path}.data").write_bytes(b"new data")
                yield path
        else:
            with staged_folder(folder / "out", overwrite=self.overwrite, resume=resume) as path:
                for name, data in NEW.items():
                    (path / name).write_bytes(data)
                yield path

    def run(self, folder: Path, *, resume: bool = False) -> None:
        with self.staged(folder, resume=resume):
            pass

    def check(self, folder: Path) -> None:
        if self.pair:
            check_file(folder / "out", overwrite=self.overwrite, companion=".data")
        else:
            check_folder(folder / "out", overwrite=self.overwrite)

    def seen(self, folder: Path) -> dict[str, bytes | str | None]:
        """What users see: nothing hidden."""
        return {name: data for name, data in tree(folder).items() if not name.startswith(".")}


CASES = [Case(pair, overwrite) for pair in (False, True) for overwrite in (False, True)]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{'pair' if c.pair else 'folder'}-{c.overwrite}")


def points(case: Case, tmp_path: Path, action: Callable[[Path], object]) -> range:
    """The numbers of the changes that an action makes."""
    case.prepare(tmp_path / "count")
    return range(1, len(count_changes(lambda: action(tmp_path / "count"))) + 1)


@each_case
@pytest.mark.parametrize("resume", [False, True])
def test_a_kill_at_any_change_loses_nothing_and_the_next_run_is_whole(case: Case, resume: bool, tmp_path: Path) -> None:
    half = 0
    for at in points(case, tmp_path, case.run):
        folder = tmp_path / str(at)
        case.prepare(folder)
        assert killed_at(at, partial(case.run, folder))
        seen = case.seen(folder)
        if seen not in (case.old, case.new):  # stopped within the swap: what is missing waits in the work folder
            half += 1
            assert "out" not in seen  # a graph never stands beside weights that are not its own
        done = not case.overwrite and seen == case.new
        if done:
            with pytest.raises(CheckpointError, match="exists"):
                case.run(folder, resume=resume)
        else:
            case.run(folder, resume=resume)
        assert tree(folder) == case.new, at
    assert half <= 4


@each_case
def test_a_check_after_a_kill_puts_the_old_one_back(case: Case, tmp_path: Path) -> None:
    for at in points(case, tmp_path, case.run):
        folder = tmp_path / str(at)
        case.prepare(folder)
        assert killed_at(at, partial(case.run, folder))
        if not case.overwrite and case.seen(folder) == case.new:
            with pytest.raises(CheckpointError, match="exists"):
                case.check(folder)
        else:
            case.check(folder)
        seen = case.seen(folder)
        assert seen in (case.old, case.new), at
        assert seen == case.old or tree(folder) == seen


@pytest.mark.parametrize("pair", [False, True])
def test_a_kill_while_an_earlier_kill_is_put_in_order_loses_nothing(pair: bool, tmp_path: Path) -> None:
    case = Case(pair, overwrite=True)
    for at in points(case, tmp_path, case.run):
        for again in range(1, 40):
            folder = tmp_path / f"{at}-{again}"
            case.prepare(folder)
            assert killed_at(at, partial(case.run, folder))
            if case.seen(folder) == case.old or not (folder / ".out.moeify-partial/old").exists():
                break  # before the swap, or after it: there is nothing to put in order
            came_so_far = killed_at(again, partial(case.check, folder))
            case.check(folder)
            assert case.seen(folder) in (case.old, case.new), (at, again)
            if not came_so_far:
                break


@pytest.mark.parametrize("placing", [{"../foreign": 0}, {"out": 0, "foreign": 0}, {"out\0": 0}, {"": 0}, [], 3])
def test_a_journal_that_no_run_has_written_moves_nothing(placing: object, tmp_path: Path) -> None:
    case = Case(pair=False, overwrite=True)
    folder = tmp_path / "folder"
    case.prepare(folder)
    for foreign in (tmp_path / "foreign", folder / "foreign"):
        foreign.write_bytes(b"foreign")
    lock = folder / ".out.moeify-partial/lock"
    lock.parent.mkdir(0o700)
    if isinstance(placing, dict):
        placing = dict.fromkeys(placing, (tmp_path / "foreign").stat().st_ino)
    lock.write_text(json.dumps({"placing": placing}) + "\n")
    (lock.parent / "old").mkdir()
    before = tree(tmp_path)
    case.check(folder)
    assert tree(tmp_path) == {name: data for name, data in before.items() if "moeify-partial" not in name}


@each_case
@pytest.mark.parametrize("number", ERRORS, ids=lambda number: errno.errorcode[number])
def test_an_error_at_any_change_is_one_line_and_leaves_what_was_there(case: Case, number: int, tmp_path: Path) -> None:
    for at in points(case, tmp_path, case.run):
        folder = tmp_path / str(at)
        case.prepare(folder)
        before = tree(folder)
        try:
            with failing(at, number):
                case.run(folder)
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1
            if "was written and is whole" in str(error):
                assert case.seen(folder) == case.new
                case_after = Case(case.pair, overwrite=True)
                case_after.run(folder)
                assert tree(folder) == case.new
            else:
                assert "cannot be written: " in str(error) or "the disk became full" in str(error)
                assert tree(folder) == before, (at, str(error))
        else:
            assert tree(folder) == case.new and number == errno.EPERM, at  # links that are not allowed are not needed


@each_case
def test_an_interrupt_at_any_change_leaves_the_old_one_or_the_new_one(case: Case, tmp_path: Path) -> None:
    for at in points(case, tmp_path, case.run):
        folder = tmp_path / str(at)
        case.prepare(folder)

        def interrupt(count: int, name: str, path: object, at: int = at) -> None:
            if count == at:
                raise KeyboardInterrupt

        with pytest.raises((KeyboardInterrupt, CheckpointError)), before_changes(interrupt):
            case.run(folder)
        assert case.seen(folder) in (case.old, case.new), at
        if case.seen(folder) == case.old:
            case.run(folder, resume=True)
        else:
            Case(case.pair, overwrite=True).run(folder)
        assert tree(folder) == case.new
