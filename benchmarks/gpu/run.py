"""One run of one stage: its deadline, its device, and the records it writes at once.

A record is a line of JSON in `results.jsonl`. A failure is a record too: nothing that one measurement raises keeps the
others from running.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a stage is given.

    Attributes:
        stage: Its name.
        out: The folder of the results.
        until: When it must have ended, by `time.time()`.
        dry: Whether there is no GPU: small shapes on the CPU, and kernels that are compiled and not launched.
    """

    stage: str
    out: Path
    until: float
    dry: bool

    @property
    def device(self) -> torch.device:
        """Where tensors lie."""
        return torch.device("cpu" if self.dry else "cuda")

    def left(self) -> float:
        """Return the seconds until this stage must have ended."""
        return self.until - time.time()

    def put(self, what: str, **fields: object) -> None:
        """Append a record and print it."""
        record = {"stage": self.stage, "what": what, **fields}
        with (self.out / "results.jsonl").open("a") as stream:
            stream.write(json.dumps(record, default=str) + "\n")
        shown = (
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in fields.items()
        )
        print(f"[{self.stage}] {what}: {', '.join(shown)}", flush=True)

    def attempt(self, what: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call a function; if it raises, the error becomes a record and the result is None."""
        try:
            return function(*args, **kwargs)
        except Exception as error:  # whatever a driver, a compiler or another project says belongs in the results
            where = " | ".join(line.strip() for line in traceback.format_exc().splitlines()[-7:-1])
            self.put(what, failed=f"{type(error).__name__}: {first_line(error)}"[:300], where=where[:600])
            return None

    def records(self) -> list[Record]:
        """Return what all stages have written so far."""
        return read_records(self.out)

    def milliseconds(self, run: Callable[[], object], warmup: int = 10, repeat: int = 40) -> float:
        """Return the median time of a call on the device, its L2 cache emptied before each; one call in a dry run.

        Args:
            run: Launches the work.
            warmup: Milliseconds of calls that do not count.
            repeat: Milliseconds of calls that count.
        """
        if self.dry:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        from triton.testing import do_bench  # needs a driver

        return float(do_bench(run, warmup=warmup, rep=repeat, return_mode="median"))

    def free_memory(self) -> None:
        """Give cached memory back to the device."""
        if not self.dry:
            torch.cuda.empty_cache()


def read_records(out: Path, name: str = "results.jsonl") -> list[Record]:
    """Return the records in a folder of results."""
    file = out / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [""])[0]
