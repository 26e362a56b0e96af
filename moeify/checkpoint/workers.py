"""Shards written by several processes, each as one process would write it.

A worker is a fork of this process: what is to be written holds functions, which no other start takes along. It takes
every n-th shard, and tells through a pipe what it does. The shards of a worker that is killed are left to the caller.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Protocol, TypeAlias

from moeify.checkpoint.shards import Shard
from moeify.errors import MoeifyError, first_line


class Writes(Protocol):
    """What writes shards."""

    def write(self, shard: Shard) -> None:
        """Write one of them."""


Writer: TypeAlias = Callable[[Callable[[int], None], Callable[[str], None]], Writes]


def write_with_workers(
    shards: Sequence[Shard],
    workers: int,
    writer: Writer,
    on_bytes: Callable[[int], None],
    on_nonfinite: Callable[[str], None],
) -> list[Shard]:
    """Write shards in several processes of this machine.

    Args:
        shards: What to write.
        workers: How many processes.
        writer: Makes what writes a shard, from these two callbacks; called in each worker.
        on_bytes: Called with the bytes written since the last call; fewer than none where a killed worker's are lost.
        on_nonfinite: Called once with the name of each tensor that holds NaN or Inf; may raise to stop.

    Returns:
        The shards that killed workers have not written.

    Raises:
        MoeifyError: What a worker raised, as OSError and ValueError; the others are stopped.
    """
    team = _Team(on_bytes, on_nonfinite)
    try:
        for number in range(min(workers, len(shards))):
            team.start(range(number, len(shards), workers), shards, writer)
        while team.receivers:
            for ready in wait(list(team.receivers)):
                assert isinstance(ready, Connection)
                team.hear(ready)
    finally:
        team.end()
    return [shard for number, shard in enumerate(shards) if number not in team.done]


class _Team:
    """The workers, and what they have told."""

    def __init__(self, on_bytes: Callable[[int], None], on_nonfinite: Callable[[str], None]) -> None:
        self.on_bytes, self.on_nonfinite = on_bytes, on_nonfinite
        self.processes: list[BaseProcess] = []
        self.receivers: dict[Connection, int] = {}  # and the bytes of the shard that each is at
        self.done: set[int] = set()
        self.named: set[str] = set()

    def start(self, mine: Sequence[int], shards: Sequence[Shard], writer: Writer) -> None:
        """Fork a worker that writes some of the shards."""
        context = get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        self.receivers[receiver] = 0
        arguments = (mine, shards, writer, sender, list(self.receivers))
        process = context.Process(target=_work, args=arguments, daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: a worker takes no lock of theirs
            process.start()
        sender.close()
        self.processes.append(process)

    def hear(self, receiver: Connection) -> None:
        """Take one message: bytes, a name, the number of a finished shard in a list, or what was raised."""
        try:
            told = receiver.recv()
        except EOFError:  # it has finished, or was killed
            if lost := self.receivers.pop(receiver):
                self.on_bytes(-lost)
            return
        match told:
            case int():
                self.receivers[receiver] += told
                self.on_bytes(told)
            case str() if told not in self.named:
                self.named.add(told)
                self.on_nonfinite(told)
            case [number]:
                self.receivers[receiver] = 0
                self.done.add(number)
            case BaseException():
                raise told

    def end(self) -> None:
        """Stop those that are still at work."""
        for process in self.processes:
            process.terminate()
            process.join()
        for receiver in self.receivers:
            receiver.close()


def _work(
    mine: Sequence[int], shards: Sequence[Shard], writer: Writer, sender: Connection, receivers: list[Connection]
) -> None:
    """Write in a worker; it ends with its parent, whose pipe nobody else may hold open."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for receiver in receivers:
        receiver.close()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # the pool of threads was not forked
    try:
        here = writer(sender.send, sender.send)
        for number in mine:
            here.write(shards[number])
            sender.send([number])
    except BrokenPipeError:
        os._exit(1)
    except (MoeifyError, OSError, ValueError) as error:
        _send(sender, error)
    except Exception as error:
        _send(sender, RuntimeError(f"{type(error).__name__}: {first_line(error)}"))
    os._exit(0)  # what the parent has registered for its end is not for a worker


def _send(sender: Connection, error: Exception) -> None:
    with suppress(OSError):
        sender.send(error)
