"""What was run: a row for each source, family and engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from moeify.families.base import LLAMA_CPP, MLX, VLLM
from sweeps.models import DOCS

RECORD = DOCS / "engines.json"
RIGHT, WRONG, UNKNOWN, REFUSED = "right", "wrong", "not known", "does not run"
MOST = 1e-5  # relative difference of a logit
GENAI, OLDER, SGLANG_LOADER = "onnxruntime-genai", "transformers 4", "SGLang's loader"
ENGINES = (VLLM, LLAMA_CPP, MLX, OLDER, GENAI, SGLANG_LOADER)
# What an engine says of a model type that it does not have.
_UNKNOWN = re.compile(
    r"does not recognize this architecture|Model type \S+ not supported|ForCausalLM\b.* not supported"
)


@dataclass(frozen=True)
class Row:
    """What came of a checkpoint in an engine.

    Attributes:
        source: The dense model, one of `sweeps.dense_sources.SOURCES`.
        family: What it became.
        engine: What ran it.
        version: Of the engine.
        result: `right`, `wrong`, `not known` or `does not run`.
        copies: The largest difference of a logit from the dense model's, relative to the largest, with experts that are
            copies; None if there are no numbers.
        differing: The same from transformers' logits, with experts that differ.
        why: What the engine says, if it does not run it.
    """

    source: str
    family: str
    engine: str
    version: str
    result: str
    copies: float | None = None
    differing: float | None = None
    why: str = ""


def judged(place: tuple[str, str, str], outcomes: dict[str, dict[str, object]]) -> Row:
    """Return the row of a source, family and engine, from what the engine's program said of each kind of experts."""
    said = next((str(told["error"]) for told in outcomes.values() if "error" in told), "")
    found = {kind: told.get("difference") for kind, told in outcomes.items()}
    numbers = {kind: float(f"{value:.1e}") if isinstance(value, float) else None for kind, value in found.items()}
    right = all(value is not None and value <= MOST for value in numbers.values())
    result = RIGHT if right else WRONG
    if said:
        result = UNKNOWN if _UNKNOWN.search(said) else REFUSED
    why = said or ("" if None not in numbers.values() else "NaN")
    version = next(str(told.get("version", "")) for told in outcomes.values())
    return Row(*place, version, result, numbers.get("copies"), numbers.get("differing"), why)


def read_record() -> list[Row]:
    """Read what was run."""
    return [Row(**entry) for entry in json.loads(RECORD.read_text())] if RECORD.exists() else []


def keep(new: Iterable[Row], path: Path = RECORD) -> None:
    """Put rows in their places in the record, a line each."""
    held = {(row.family, row.engine, row.source): row for row in [*read_record(), *new]}
    rows = [json.dumps(asdict(held[place])) for place in sorted(held)]
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n")


def right_engines(family: str) -> dict[str, bool]:
    """Return the engines that were right for a family, and whether they were from every source."""
    found = {engine: [row.result == RIGHT for row in read_record() if (row.family, row.engine) == (family, engine)]
             for engine in ENGINES if engine != SGLANG_LOADER}  # fmt: skip
    return {engine: all(results) for engine, results in found.items() if any(results)}
