"""Run every engine on every native family, and write docs/engines.json and docs/engines.md.

    python -m sweeps.engines                            everything (hours on two cores)
    python -m sweeps.engines --engine vLLM mlx-lm       some engines again: the other rows stay
    python -m sweeps.engines --source llama             one source
    python -m sweeps.engines --family mixtral           one family
    python -m sweeps.engines --page                     only writes the page

Each engine runs in the environment that holds it, in a process for some sources. What ends that process costs its
checkpoint alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moeify.families.base import LLAMA_CPP, MLX, VLLM
from sweeps.dense_sources import SOURCES
from sweeps.engines.page import PAGE, table
from sweeps.engines.prepare import Prepared, prepare
from sweeps.engines.record import GENAI, OLDER, SGLANG_LOADER, Row, judged, keep, read_record
from sweeps.models import DOCS

ROOT = DOCS.parent
SECONDS = 900  # for one checkpoint
TOGETHER = 6  # sources: an engine's imports take longer than a checkpoint


@dataclass(frozen=True)
class Engine:
    """How an engine is run.

    Attributes:
        program: The module in this package.
        environment: The environment that holds it, in the folder of all environments.
        variables: What it finds in its process, with the folder of all environments for `{}`.
    """

    program: str
    environment: str
    variables: dict[str, str] = field(default_factory=dict)


_LLAMA_CPP = {"LLAMA_CPP": "{}/llama.cpp", "LLAMA_CPP_LIB_PATH": "{}/llama.cpp/lib"}
_VLLM = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
         "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}  # fmt: skip
ENGINES = {
    VLLM: Engine("with_vllm", "vllm", _VLLM),
    LLAMA_CPP: Engine("with_llama_cpp", "older", _LLAMA_CPP),
    MLX: Engine("with_mlx", "main"),
    OLDER: Engine("with_transformers", "older"),
    GENAI: Engine("with_genai", "main"),
    SGLANG_LOADER: Engine("with_sglang", "vllm"),
}


def run(engine: Engine, environments: Path, folders: list[Path]) -> dict[str, dict[str, object]]:
    """Run an engine on folders; what each came to."""
    variables = {name: value.format(environments) for name, value in engine.variables.items()}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                   "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **variables}  # fmt: skip
    command = [str(environments / engine.environment / "bin/python"), "-m", f"sweeps.engines.{engine.program}"]
    found: dict[str, dict[str, object]] = {}
    while left := [str(folder) for folder in folders if str(folder) not in found]:
        limit = SECONDS * len(left)
        try:
            done = subprocess.run([*command, *left], env=environment, cwd=ROOT, capture_output=True, text=True,
                                  errors="replace", timeout=limit, check=False)  # fmt: skip
        except subprocess.TimeoutExpired:
            return {**found, **{folder: {"error": f"not done after {limit} seconds"} for folder in left}}
        told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"version"')]
        found.update({answer["folder"]: answer for answer in told})
        if len(told) < len(left):
            words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            found[left[len(told)]] = {"error": f"the process ended with {done.returncode}: {words}"[:400]}
    return found


def run_sources(names: Sequence[str], given: argparse.Namespace) -> None:
    """Run the engines that are asked for on some sources, and keep what came of each."""
    with tempfile.TemporaryDirectory(dir=given.room) as room:
        rooms = {name: Path(room, str(number)) for number, name in enumerate(names)}
        prepared = [place for name in names for place in prepare(name, rooms[name], set(given.family or ()))]
        for engine in given.engine or ENGINES:
            told = run(ENGINES[engine], given.environments, [place.folder for place in prepared])
            rows = [_row(engine, pair, prepared, told) for pair in dict.fromkeys(map(_pair, prepared))]
            keep(rows)
            for row in rows:
                print(row.source, row.family, row.engine, row.result, row.copies, row.differing, row.why, sep=" | ",
                      flush=True)  # fmt: skip


def _pair(place: Prepared) -> tuple[str, str]:
    return place.source, place.family


def _row(engine: str, pair: tuple[str, str], prepared: list[Prepared], told: dict[str, dict[str, object]]) -> Row:
    places = [place for place in prepared if _pair(place) == pair]
    return judged((*pair, engine), {place.kind: told[str(place.folder)] for place in places})


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", nargs="*", choices=ENGINES)
    parser.add_argument("--source", nargs="*", choices=SOURCES)
    parser.add_argument("--family", nargs="*")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-engines")
    parser.add_argument("--room", type=Path, help="where the checkpoints of some sources lie: 6 GB")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    names = [] if given.page else list(given.source or SOURCES)
    for start in range(0, len(names), TOGETHER):
        run_sources(names[start : start + TOGETHER], given)
    PAGE.write_text(table(read_record()))


if __name__ == "__main__":
    main()
