"""`moeify convert` against `mergekit-moe`: SmolLM2-135M in fp32 becomes a Mixtral of 8 equal experts.

    python -m benchmarks.convert_vs_mergekit --venv ~/.cache/mergekit-venv

mergekit is installed into an environment of its own the first time. Record and page are written beside this file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Command, by_turns, make_checkpoint, measure, medians, need_space, raw, table
from benchmarks.record import Record, keep, measured

MERGEKIT = ("mergekit==0.1.5", "torch==2.13.0")
PEER = "mergekit-moe"
CODE = ("moeify/checkpoint", "moeify/conversion", "moeify/cli/writing.py")
CONFIG = """\
base_model: {src}
gate_mode: random
architecture: mixtral
dtype: float32
experts_per_token: 2
experts:
"""
# What any conversion with these libraries does: import them, let torch.export trace something, and write the bytes.
IMPORTS = """\
import pathlib, sys, torch
from transformers import LlamaForCausalLM
torch.export.export(torch.nn.Linear(3, 4, device="meta"), (torch.empty(2, 3, device="meta"),), strict=False)
pathlib.Path(sys.argv[1]).mkdir()
"""


def install_mergekit(folder: Path) -> Path:
    """The program `mergekit-moe`, installed into `folder` unless it is there."""
    program = folder / "bin/mergekit-moe"
    if not program.exists():
        print(f"installing {' '.join(MERGEKIT)} into {folder}", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin/pip", "install", "--quiet", *MERGEKIT], check=True)
    return program


def compare(work: Path, mergekit: Path, repeats: int) -> Record:
    """Return what was measured."""
    src = make_checkpoint("smollm2", work / "smollm2")
    config = work / "mergekit.yaml"
    config.write_text(CONFIG.format(src=src) + f"  - source_model: {src}\n" * 8)
    ours, theirs = work / "ours", work / "theirs"
    convert = ("convert", src, ours, "--experts", "8", "--top-k", "2", "--to", "mixtral", "--no-verify")
    merge = (mergekit, config, theirs, "--i-understand-this-is-not-useful-without-training")
    moeify = Command("moeify convert", (sys.executable, "-m", "moeify", *convert), ours)
    made, copied = work / "made", work / "copied"
    measure(moeify)
    ours.rename(made)
    imports = Command("imports", (sys.executable, "-c", IMPORTS, work / "imports"), work / "imports")
    copy = Command("cp and sync", ("sh", "-c", f"cp -r '{made}' '{copied}' && sync -f '{copied}'"), copied)
    runs = by_turns([moeify, Command(PEER, merge, theirs), imports, copy], repeats)
    what = "SmolLM2-135M, fp32 safetensors → Mixtral, 8 experts, top-2"
    peers = {f"{PEER}'s {name}": version for name, _, version in (each.partition("==") for each in MERGEKIT)}
    return measured(what, PEER, CODE, summary(raw(runs)), raw(runs), versions=peers)


def summary(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Return the medians of each command, beside the peer's, and what is left when nothing but the floor is done."""
    rows = medians(runs, PEER)
    return {**rows, "floor": rows["imports"]["time"] + rows["cp_and_sync"]["time"]} if "imports" in rows else rows


def page(record: Record) -> str:
    """Return the page of a record."""
    rows = {name: row for name, row in record.summary.items() if name != "floor"}
    floor = (
        "\n\n*imports* loads torch and transformers and lets torch.export trace one linear layer; *cp and sync* brings "
        f"the same bytes to the disk. Together they are {record.summary['floor']:.2f} of {PEER}'s time: the least that "
        "a conversion with these libraries can take."
        if "floor" in record.summary
        else ""
    )
    return (
        "# moeify convert against mergekit-moe\n\n"
        f"{record.what}.\n"
        "Run by turns, the disk flushed before each run, nothing verified on either side.\n"
        f"{record.line()}\n\n"
        f"{table(rows, PEER)}{floor}\n"
    )


def main() -> None:
    """Install, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True, help="where mergekit is, or will be, installed")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="a folder with 10 GiB free")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    need_space(args.work, 10)
    mergekit = install_mergekit(args.venv.expanduser().resolve())
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        keep(__file__, compare(Path(work), mergekit, args.repeats), page)


if __name__ == "__main__":
    main()
