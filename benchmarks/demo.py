"""What `moeify demo` measures: how far the MoE of SmolLM2-135M is from the dense model, by layers and in the whole.

python -m benchmarks.demo [--work FOLDER]    some minutes; writes record and page beside this file
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import need_space
from benchmarks.record import Record, keep, measured

CODE = ("moeify/conversion", "moeify/proving", "moeify/families", "moeify/cli/demo.py")
SAID = {
    "layers": r"\[3/\d\].*\n(\d+) layers",
    "worst_layer": r"\[3/\d\].*\n.*? ([\d.e-]+) in float64",
    "logits": r"\[3/\d\].*\n.*relative difference ([\d.e-]+)",
    "dense_perplexity": r"^dense ([\d.]+)   MoE",
    "moe_perplexity": r"^dense [\d.]+   MoE ([\d.]+)",
}


def summary(runs: Mapping[str, str]) -> dict[str, float]:
    """Return the numbers that the demo printed."""
    found = {name: re.search(pattern, runs["printed"], re.MULTILINE) for name, pattern in SAID.items()}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        raise SystemExit(f"the demo does not say {', '.join(missing)}: bring the patterns of this program up to date")
    return {name: float(match[1]) for name, match in found.items() if match}


def page(record: Record) -> str:
    """Return the page of a record."""
    said: Mapping[str, Any] = record.summary
    return (
        "# What the demo measures\n\n"
        f"{record.what}.\n"
        f"{record.line()}\n\n"
        "| | |\n|---|--:|\n"
        f"| worst of {said['layers']:.0f} layers, on equal inputs in float64 | {said['worst_layer']:.1e} |\n"
        f"| logits in float32, relative to the largest | {said['logits']:.1e} |\n"
        f"| perplexity before and after | {said['dense_perplexity']:.4f}, {said['moe_perplexity']:.4f} |\n"
    )


def main() -> None:
    """Run the demo and keep what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="a folder with 4 GiB free")
    work = parser.parse_args().work
    need_space(work, 4)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        demo = (sys.executable, "-m", "moeify", "demo", "--dir", Path(folder, "demo"))
        printed = subprocess.run(demo, check=True, stdout=subprocess.PIPE, text=True).stdout
    runs = {"printed": printed.replace(folder, "…")}
    what = "SmolLM2-135M as a Mixtral of 8 experts, top-2, written by `moeify convert` and compared"
    keep(__file__, measured(what, "the dense model", CODE, summary(runs), runs), page)


if __name__ == "__main__":
    main()
