"""One conversion by several machines with a shared file system: each writes a part, and the last to finish joins them.

Every machine makes the same plan and lists the same files. A part is every n-th of them, as with workers; the join
gives them their names in the output, and makes what a single run makes after its last file: index, config and proof.
"""

from __future__ import annotations

from dataclasses import replace

from moeify.checkpoint.writer import DEPENDS_ON, Files, holds_header
from moeify.conversion.checkpoint import Callbacks, Output, complete, planned_files, write_planned
from moeify.conversion.dense import DenseCheckpoint
from moeify.errors import CheckpointError
from moeify.files.parts import Parts
from moeify.files.staging import staged_folder
from moeify.files.work_folder import BusyError
from moeify.plan import Plan


def convert_part(
    dense: DenseCheckpoint, plan: Plan, output: Output, callbacks: Callbacks, number: int, count: int
) -> list[int] | None:
    """Write one part of a converted checkpoint, and join all if it is the last.

    A part that was stopped goes on where it stopped; one that is finished is kept.

    Args:
        dense: The dense checkpoint.
        plan: As for `convert_checkpoint`; the same for every part.
        output: What is written, and where.
        callbacks: What is called meanwhile; `check` in the join only.
        number: Which part, from 1 on.
        count: How many there are.

    Returns:
        The parts that are missing; nothing where the output is made, and None where another part is making it.

    Raises:
        CheckpointError: Another part is of another conversion; or as from `convert_checkpoint`.
    """
    files, parts = planned_files(dense, plan, output, callbacks), Parts(output.folder, count)
    parts.check(files.fingerprint, DEPENDS_ON)
    mine = replace(files, shards=files.shards[number - 1 :: count])
    callbacks.total(mine.nbytes)
    if number in parts.missing():
        _write_part(mine, parts, number, output, callbacks)
    if missing := parts.missing():
        return missing if number not in missing else None  # another part has joined all, and removed this one
    try:
        _join(dense, plan, output, callbacks, files, parts)
    except CheckpointError as error:
        if isinstance(error, BusyError) or parts.missing() or (output.folder.exists() and not output.overwrite):
            return None
        raise
    return []


def join_parts(dense: DenseCheckpoint, plan: Plan, output: Output, callbacks: Callbacks) -> None:
    """Make the converted checkpoint of parts that are all written.

    Args:
        dense: The dense checkpoint.
        plan: That of the parts.
        output: What is written, and where.
        callbacks: What is called meanwhile.

    Raises:
        CheckpointError: Parts are missing, damaged or of another conversion; or as from `convert_checkpoint`.
    """
    files, parts = planned_files(dense, plan, output, callbacks), Parts(output.folder)
    parts.check(files.fingerprint, DEPENDS_ON)
    if missing := parts.missing():
        raise CheckpointError(
            f"{output.folder} is not joined: of its {parts.count} parts these are not finished: "
            f"{', '.join(map(str, missing))}; run them with --part, or again where they were stopped"
        )
    _join(dense, plan, output, callbacks, files, parts)


def _write_part(mine: Files, parts: Parts, number: int, output: Output, callbacks: Callbacks) -> None:
    place = parts.folder(number)
    with staged_folder(place, overwrite=False, resume=True, sources=mine.source.folders, nbytes=mine.nbytes) as folder:
        write_planned(mine, folder, output, callbacks, resume=True)
        mine.source.check_unchanged()
        parts.finish(folder, mine.fingerprint)


def _join(dense: DenseCheckpoint, plan: Plan, output: Output, callbacks: Callbacks, files: Files, parts: Parts) -> None:
    parts.check(files.fingerprint, DEPENDS_ON)  # again: parts that began together could not see each other
    options = {"overwrite": output.overwrite, "resume": False}
    with staged_folder(output.folder, sources=files.source.folders, **options) as folder:
        for place, shard in enumerate(files.shards):
            number = place % parts.count + 1
            parts.take(number, shard.name, folder)
            if not holds_header(folder / shard.name, shard):
                raise CheckpointError(f"{parts.folder(number)} is damaged: remove it, and run the part again")
        files.source.write_side_files(folder)
        complete(dense, plan, output, callbacks, files, folder)
    parts.remove()
