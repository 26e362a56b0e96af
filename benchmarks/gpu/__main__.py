"""Check and time the kernels on this machine's GPU, in stages that write their results at once.

    python -m benchmarks.gpu                     the kernels, in 8 minutes at most
    python -m benchmarks.gpu onnx                exported files in onnxruntime-gpu, in 4 minutes at most
    python -m benchmarks.gpu env layers tune     some stages, in this order
    python -m benchmarks.gpu --dry               without a GPU: small shapes on the CPU, kernels compiled and not run

Results: results.jsonl (a record a line), log.txt, summary.txt; tiles.json of the stage tune, profile.txt of train, and
what NVIDIA's tools printed. A stage that fails or is stopped costs its own results alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.plan import BUDGET, GROUPS, STAGES, Stage

LEAST = 12  # seconds that a stage needs to be worth its start
LONGEST = 300  # seconds for a stage that was asked for by name
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRITON_CACHE_DIR": "/tmp/moeify_triton_cache",
    "TRITON_DEFAULT_FP_FUSION": "1",  # as up to Triton 3.9, which warns that its default will change
}


@dataclass
class Driver:
    """Runs stages one after the other until the time is spent.

    Attributes:
        out: The folder of the results.
        until: When everything must have ended.
        dry: Whether there is no GPU; then all stages run in this process, which has imported everything by then.
        named: Whether the stages were asked for by name, and so may take longer.
    """

    out: Path
    until: float
    dry: bool
    named: bool = False

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.until - time.time()

    def say(self, text: str) -> None:
        """Print a line, and add it to the log."""
        print(f"-- {text}", flush=True)
        with self.log.open("a") as stream:
            stream.write(f"-- {text}\n")

    @property
    def log(self) -> Path:
        """Where the stages' own output goes."""
        return self.out / "log.txt"

    def run(self, stage: Stage) -> None:
        """Run a stage with the smaller of its limit and what is left, and wait for what compiles beside it."""
        if self.left() < LEAST:
            self.say(f"{stage.name} skipped: {self.left():.0f} s left")
            return
        if stage.tool and (self.dry or shutil.which(stage.tool[0]) is None):
            self.say(f"{stage.name} skipped: no {stage.tool[0]} here")
            return
        seconds = min(LONGEST if self.named or self.dry else stage.seconds, self.left())
        self.say(f"{stage.name}: at most {seconds:.0f} s of {self.left():.0f} s")
        if self.dry:
            self._run_here(stage, seconds)
            return
        if stage.beside:
            other = STAGES[stage.beside]
            beside = self._start(other, min(other.seconds, self.left()))
        code = self._wait(self._start(stage, seconds), seconds)
        if code:
            self.say(f"{stage.name} ended with {code}")
        if stage.beside:
            self._wait(beside, min(STAGES[stage.beside].seconds, self.left()))

    def _run_here(self, stage: Stage, seconds: float) -> None:
        from benchmarks.gpu.stage import run_here

        with self.log.open("a") as stream, redirect_stdout(stream):
            for one in (STAGES[stage.beside], stage) if stage.beside else (stage,):
                run_here(one, self.out, time.time() + seconds, dry=True)

    def _start(self, stage: Stage, seconds: float) -> subprocess.Popen[bytes]:
        until = str(time.time() + seconds - 3)
        command = (*stage.tool, sys.executable, "-m", "benchmarks.gpu.stage", stage.name, str(self.out), until)
        output = self.out / f"{stage.name}.txt" if stage.tool else self.log
        with output.open("ab") as stream:
            environment = {**os.environ, **dict(stage.environment)}
            return subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def _wait(self, process: subprocess.Popen[bytes], seconds: float) -> int | str:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # with the processes that it started
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        return f"its limit of {seconds:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages and print the summary."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    known = [*GROUPS, *STAGES]
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(known)}; kernels without one")
    parser.add_argument("--dry", action="store_true", help="without a GPU")
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="for all stages together")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stages if name not in known]
    if unknown:
        parser.error(f"no stage {unknown[0]!r}: expected some of {', '.join(known)}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    started = time.time()
    options.out.mkdir(parents=True, exist_ok=True)
    stages = [name for asked in options.stages for name in GROUPS.get(asked, (asked,))]
    driver = Driver(options.out.resolve(), started + options.seconds, options.dry, named=stages == options.stages != [])
    for name in stages or GROUPS["kernels"]:
        driver.run(STAGES[name])
    from benchmarks.gpu.summary import summary

    text = summary(driver.out)
    (driver.out / "summary.txt").write_text(text + "\n")
    print(f"{text[:11000]}\n{time.time() - started:.0f} s in all", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
