from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from moeify.checkpoint import writer
from moeify.checkpoint.shards import Shard
from moeify.cli.signals import signals_as_interrupts
from tests.moeify import tiny
from tests.moeify.command import moeify_command


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_interrupt_inside_and_what_it_was_outside(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores one of the two
    try:
        with pytest.raises(KeyboardInterrupt), signals_as_interrupts():
            os.kill(os.getpid(), number)
            time.sleep(1)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_as_interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_the_main_thread_has_signals() -> None:
    done = []

    def other() -> None:
        with signals_as_interrupts():
            done.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert done == [signal.SIG_DFL]


def test_a_conversion_that_is_ended_says_how_to_go_on_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src, dst = tiny.save(tiny.build("llama"), tmp_path / "src"), tmp_path / "a" / "moe"
    arguments = ["convert", str(src), str(dst), "--experts", "3", "--top-k", "2", "--no-verify", "--shard-size", "40KB"]
    write = writer._ShardWriter.write

    def ended_at(number: str) -> str:
        def write_and_end(self: writer._ShardWriter, shard: Shard) -> None:
            if number in shard.name:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            write(self, shard)

        monkeypatch.setattr(writer._ShardWriter, "write", write_and_end)
        result = moeify_command(*arguments)
        assert result.exit_code == 1 and not dst.exists()
        return result.stderr.splitlines()[-1]

    assert ended_at("00001-of") == f"Error: interrupted; {dst} was not made"
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert ended_at("00002-of") == f"Error: interrupted; {dst} was not made: run again with --resume to go on"
    monkeypatch.undo()
    assert moeify_command(*arguments, "--resume").exit_code == 0
    assert [path.name for path in dst.parent.iterdir()] == ["moe"]
