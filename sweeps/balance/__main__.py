"""Train every model in every script, and write docs/balance.json and docs/balance.md.

python -m sweeps.balance            everything (minutes)
python -m sweeps.balance --page     only writes the page
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import wrap

from benchmarks.record import measured, read, write
from sweeps.balance.run import ASKED, EXPERTS, MODELS, NATIVE, TOP_K, Row, measure, write_models
from sweeps.balance.scripts import RATE, ROWS, SCRIPTS, STEPS
from sweeps.models import DOCS

CODE = ("moeify/training", "moeify/routing", "moeify/layers")
RESULTS, PAGE = DOCS / "balance.json", DOCS / "balance.md"


def cases() -> Iterator[tuple[str, str, str, int]]:
    """Yield script, model, what is asked for, and micro-batches of a step."""
    for script in SCRIPTS:
        yield script, "llama", "", 1
        yield script, "mixtral", "", 1
    for script in ("loop", "Trainer", "SFTTrainer"):
        yield script, "gpt2", "", 1
        yield script, "llama", "", 4
    yield "loop", "llama, attach_losses=False", "", 1
    for model in NATIVE:
        yield "Trainer", model, ASKED, 1
    for model in NATIVE[1:]:
        yield "loop", model, "", 1
    yield "SFTTrainer", "mixtral", "", 4


def verdict(row: Row) -> str:
    """Return how it ended, for the page."""
    if not row.right:
        return "**nobody said so**" if row.warned + bool(row.told) == 0 else "said more than once"
    if row.balanced and not row.warned:
        return "in use"
    return "said by a warning" if row.warned else "said by `moeify convert`"


def page(rows: Sequence[Row], versions: str) -> str:
    """Return the document."""
    right = sum(row.right for row in rows)
    about = (
        f"Tiny models with random weights, {EXPERTS} experts, top-{TOP_K}, written by `moeify convert` and trained "
        f"on bytes of Python's help with AdamW at {RATE:g}: {STEPS} steps of {ROWS} rows, in one piece or in 4 "
        "micro-batches. No script has a line for experts. *least* and *most* are the shares of the choices that the "
        "idlest and the busiest expert of a layer get in the end, on rows that were not trained on, by its fair share. "
        "Below a quarter or above 4 the experts are not in use, and then the user must have been told once: by a "
        "warning in training, or by `moeify convert`, which says of native models that transformers balances them only "
        f"with `{ASKED}`, and then all layers together. `python -m sweeps.balance` writes this page from "
        "docs/balance.json."
    )
    text = [
        "# Balance in unchanged scripts",
        "",
        *wrap(about, 118),
        "",
        f"{len(rows)} runs, {right} as they should be, with {versions}.",
        "",
        "| model | script | micro-batches | loss | least | most | experts |",
        "|---|---|--:|---|--:|--:|---|",
        *(_line(row) for row in rows),
    ]
    return "\n".join(text) + "\n"


def _line(row: Row) -> str:
    model = f"{row.model}, `{row.asked}`" if row.asked else row.model
    loss = f"{row.first:.2f} → {row.last:.2f}"
    cells = (model, row.script, str(row.accumulated), loss, f"{row.least:.2f}", f"{row.most:.2f}", verdict(row))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Train what is to be trained; write the record and the page."""
    if sys.argv[1:] != ["--page"]:
        rows = read_record()[0] if sys.argv[1:] == ["--missing"] else []
        known = {(row.script, row.model, row.asked, row.accumulated) for row in rows}
        with tempfile.TemporaryDirectory() as folder:
            told = write_models(Path(folder))
            for case in (case for case in cases() if case not in known):
                rows.append(measure(*case, Path(folder), told[case[1]]))
                print(_line(rows[-1]), flush=True)
                keep(rows)
    PAGE.write_text(page(*read_record()))


def keep(rows: Sequence[Row]) -> None:
    """Write the record."""
    found = {"runs": len(rows), "right": sum(row.right for row in rows)}
    runs = {f"{row.script}, {row.model}, {row.asked}, {row.accumulated}": asdict(row) for row in rows}
    what = "The use of experts after training scripts that know none"
    write(measured(what, "native models", CODE, found, runs, packages=("trl",)), RESULTS)


def read_record() -> tuple[list[Row], str]:
    """Read what was run, in the order of the page, and with which versions."""
    record = read(RESULTS)
    versions = f"transformers {record.versions['transformers']}, TRL {record.versions['trl']}"
    return sorted((Row(**row) for row in record.runs.values()), key=_place), versions


def _place(row: Row) -> tuple[int, str, int]:
    return list(MODELS).index(row.model), row.asked, row.accumulated


if __name__ == "__main__":
    main()
