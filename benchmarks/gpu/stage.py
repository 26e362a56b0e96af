"""One stage in this process: `python -m benchmarks.gpu.stage NAME OUT UNTIL [--dry]`; the driver calls it."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path

from benchmarks.gpu.plan import STAGES, Stage
from benchmarks.gpu.run import Run


def run_here(stage: Stage, out: Path, until: float, dry: bool) -> None:
    """Run a stage; what it raises is a record."""
    module, _, function = stage.function.rpartition(".")
    run, started = Run(stage.name, out, until, dry), time.time()
    run.attempt(stage.name, lambda: getattr(import_module(f"benchmarks.gpu.{module}"), function)(run))
    run.put("stage ended", seconds=time.time() - started)


if __name__ == "__main__":
    name, folder, until, *options = sys.argv[1:]
    run_here(STAGES[name], Path(folder), float(until), "--dry" in options)
