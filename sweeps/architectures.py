"""Write docs/architectures.md and .json: every model type that transformers registers, traced, searched and counted.

    python -m sweeps.architectures              the whole table (half an hour)
    python -m sweeps.architectures llama t5     some model types, on stdout
    python -m sweeps.architectures --rows DIR   what DIR lacks of it, then the whole table from DIR

What the matcher finds by dataflow is compared with a count by the names and shapes of the parameters, which knows
nothing of graphs. Where names say too much or too little, sweeps/looked_up.json has what was looked up by hand.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import transformers

from benchmarks.record import measured, write
from sweeps.examine import Row, examine
from sweeps.models import DOCS, looked_up, model_types

RECORD = DOCS / "architectures.json"
CODE = ("passes", "moeify/tracing")
SAID = (
    "{types} types: {right} with exactly the expected FFNs, {wrong} not "
    "({extra} of them with something that is no FFN), {not_examined} that could not be built or traced."
)


def table(rows: list[Row]) -> str:
    """Return the document."""
    counts = summary(rows)
    corrected = sum(bool({"also", "not"} & looked_up(row.model_type).keys()) for row in rows)
    lines = [
        "# Architectures",
        "",
        f"Every model type that transformers {transformers.__version__} registers for language, vision and audio,",
        "built with two layers a stack on the meta device, traced, and searched for dense FFNs. This page is written",
        "by `make docs`.",
        "",
        SAID.format(**counts),
        "",
        "The expected FFNs are counted by `sweeps/count_by_name.py`, which knows nothing of graphs: a pair",
        "of parameters named as transformers names FFNs (`fc1` and `fc2`, `up_proj` and `down_proj`, …) whose",
        f"shapes lead from a width and back to it. For {corrected} types such names say too much or too little; there,",
        "a person read the model after the two counts disagreed, and sweeps/looked_up.json holds the patterns.",
        "",
        "| why not built or traced | types |",
        "|---|---|",
        *_causes(rows),
        "",
        "`*` some of the FFNs are shared experts of an MoE that the model already has. `†` parts of the model were",
        "traced by themselves. `graph`: the FFN is written into its block, so that only the graph passes replace it.",
        "",
        "| model type | task | found / expected | form | applier | refused, and notes |",
        "|---|---|--:|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(row) for row in rows)]) + "\n"


def summary(rows: list[Row]) -> dict[str, int]:
    """Return how many types there are, how many could be examined, and how many of those are right."""
    seen = [row for row in rows if not row.problem]
    right = sum(row.right for row in seen)
    extra = sum(bool(row.found.keys() - row.expected.keys()) for row in seen)
    return {"types": len(rows), "examined": len(seen), "right": right, "wrong": len(seen) - right, "extra": extra,
            "not_examined": len(rows) - len(seen)}  # fmt: skip


def _causes(rows: list[Row]) -> Iterator[str]:
    """Yield a line for each cause that keeps types from being examined, most types first."""
    types: dict[str, list[str]] = {}
    for row in rows:
        if row.problem:
            types.setdefault(_cause(row.problem), []).append(row.model_type)
    for cause, names in sorted(types.items(), key=lambda item: -len(item[1])):
        yield f"| {cause} | {len(names)}: {', '.join(names)} |"


def _cause(problem: str) -> str:
    """Say in general what a problem comes from."""
    if "timm" in problem.lower():
        return "part of it is a model of timm, which needs torchvision"
    if library := re.search(r"requires the (\w+) library|No module named '(\w+)'", problem):
        return f"needs {library[1] or library[2]}, which is not installed"
    if problem.startswith("not built"):
        return "its configuration has no defaults that make a model"
    return "torch.export does not trace it from inputs that can be guessed, and no part of it holds an FFN that traces"


def _count(row: Row) -> str:
    return "-" if row.problem else f"{len(row.found)} / {len(row.expected)}{'' if row.right else ' ✗'}"


def _row(row: Row) -> str:
    marks = "*" * bool(row.shared_experts) + "†" * bool(row.parts)
    remarks = "; ".join(text for text in (row.note, row.problem, *row.refused) if text).replace("|", "\\|")
    return (
        f"| {row.model_type}{marks} | {row.task} | {_count(row)} | {', '.join(row.forms)} | {row.applier} | {remarks} |"
    )


def examine_missing(folder: Path) -> list[Row]:
    """Return a row for every type: what `folder` holds, and for the others what is examined now and put there."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in sorted(model_types()) if not (folder / f"{name}.json").exists()]
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=25) as pool:  # torch.export keeps memory
        for row in pool.imap_unordered(examine, missing):
            (folder / f"{row.model_type}.json").write_text(json.dumps(asdict(row), indent=1))
    return [read_row(folder / f"{name}.json") for name in sorted(model_types())]


def read_row(path: Path) -> Row:
    """Read a row that `examine_missing` wrote."""
    held = json.loads(path.read_text())
    for name in ("found", "expected"):
        held[name] = {weight: tuple(sizes) for weight, sizes in held[name].items()}
    return Row(**held | {name: tuple(held[name]) for name in ("forms", "refused")})


def main() -> None:
    """Examine the named types, or all of them in two processes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("types", nargs="*", help="model types to examine, on stdout")
    parser.add_argument("--rows", type=Path, help="folder that keeps a file for each type: delete one to examine anew")
    given = parser.parse_args()
    if not given.types:
        with tempfile.TemporaryDirectory() as own:
            rows = examine_missing(given.rows or Path(own))
        what = "FFNs found by dataflow, in the model types of transformers"
        counts = {row.model_type: _count(row) for row in rows}
        write(measured(what, "a count by names of parameters", CODE, summary(rows), counts), RECORD)
        RECORD.with_suffix(".md").write_text(table(rows))
        return
    rows = [examine(name) for name in given.types]
    print(*(_row(row) for row in rows), sep="\n")
    for row in rows:
        missing, extra = row.expected.keys() - row.found.keys(), row.found.keys() - row.expected.keys()
        print(row.model_type, "missing", missing, "extra", extra)


if __name__ == "__main__":
    main()
