"""Parts of one output that several machines write, each a folder of its own beside the output until they are joined.

A part appears whole or not at all, as every output does. A record in it says what it is a part of.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from moeify.errors import CheckpointError
from moeify.files.commit import NO_LINKS
from moeify.files.limits import CONFIG_BYTES
from moeify.files.reading import list_folder, read_bytes
from moeify.files.staging import RESUME_RECORD, begun_folder, output_path, settle
from moeify.files.work_folder import BusyError

_RECORD = ".moeify-part"


class Parts:
    """The parts of an output.

    Args:
        output: The output folder.
        count: How many parts; None for as many as those that are there say.

    Raises:
        CheckpointError: There are none, or some of another division.
    """

    def __init__(self, output: Path, count: int | None = None) -> None:
        self.output = output = output_path(output)
        name = re.compile(rf"{re.escape(output.name)}\.part-[1-9]\d{{0,8}}-of-([1-9]\d{{0,8}})")
        there = list_folder(output.parent) if output.parent.is_dir() else []
        found = {int(match[1]): path for path in there if (match := name.fullmatch(path.name))}
        if count is None and not found:
            raise CheckpointError(f"{output} has no parts beside it to join: write them first, with --part")
        self.count = min(found) if count is None else count
        for other, path in found.items():
            if other != self.count:
                raise CheckpointError(
                    f"{path} is a part of another division of {output} than {self.count}: remove it, or divide alike"
                )

    def folder(self, number: int) -> Path:
        """Return the place of a part, from 1 on."""
        return self.output.with_name(f"{self.output.name}.part-{number}-of-{self.count}")

    def missing(self) -> list[int]:
        """Return the parts that are not finished."""
        return [number for number in range(1, self.count + 1) if not (self.folder(number) / _RECORD).is_file()]

    def check(self, record: str, depends_on: Sequence[str]) -> None:
        """Hold the parts, finished or begun, to what they are to be parts of.

        Args:
            record: A line for each of what it depends on.
            depends_on: That, in words.

        Raises:
            CheckpointError: One is a part of something else.
        """
        for number in range(1, self.count + 1):
            folder = self.folder(number)
            begun = begun_folder(folder) / RESUME_RECORD
            for path in (folder / _RECORD, begun):
                if not path.is_file() or (path == begun and not path.stat().st_size):  # it is just being written
                    continue
                if other := _differing(path, record, depends_on):
                    raise CheckpointError(
                        f"{path.parent} (part {number} of {self.count}) was written for another {other}: give every "
                        "part the same, or remove it"
                    )

    def finish(self, staged: Path, record: str) -> None:
        """Say in the folder of a part what it is a part of."""
        (staged / _RECORD).write_text(record)

    def take(self, number: int, name: str, folder: Path) -> None:
        """Give a file of a part a second name in a folder; where that is not possible, copy it."""
        path = self.folder(number) / name
        try:
            os.link(path, folder / name)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            shutil.copyfile(path, folder / name)

    def remove(self) -> None:
        """Remove the parts, when they are joined, and what killed runs of them left.

        Raises:
            CheckpointError: One cannot be removed.
        """
        try:
            for number in range(1, self.count + 1):
                with suppress(BusyError):  # the same part is being written again: what it leaves is that run's
                    settle(self.folder(number), resumable=False)
                with suppress(FileNotFoundError):
                    shutil.rmtree(self.folder(number))
        except OSError as error:
            raise CheckpointError(
                f"{self.output} was written and is whole, but {error.filename} of its parts was not deleted "
                f"({error.strerror}): delete it yourself"
            ) from error


def _differing(path: Path, record: str, depends_on: Sequence[str]) -> str | None:
    """Return what a record tells to be another; None if it is equal."""
    theirs, mine = read_bytes(path, CONFIG_BYTES).decode(errors="replace").splitlines(), record.splitlines()
    if len(theirs) != len(mine):
        return "conversion"
    return next((what for what, a, b in zip(depends_on, theirs, mine, strict=True) if a != b), None)
