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
from functools import partial
from pathlib import Path

from benchmarks.measure import Command, by_turns, make_checkpoint, medians, need_space, raw, table
from benchmarks.record import Record, keep, measured

MERGEKIT = ("mergekit==0.1.5", "torch==2.13.0")
PEER = "mergekit-moe"
CODE = ("moeify/checkpoint", "moeify/conversion", "moeify/cli/writing.py")
summary = partial(medians, against=PEER)
CONFIG = """\
base_model: {src}
gate_mode: random
architecture: mixtral
dtype: float32
experts_per_token: 2
experts:
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
    runs = by_turns(
        [
            Command("moeify convert", (sys.executable, "-m", "moeify", *convert), ours),
            Command(PEER, merge, theirs),
        ],
        repeats,
    )
    what = "SmolLM2-135M, fp32 safetensors → Mixtral, 8 experts, top-2"
    peers = {f"{PEER}'s {name}": version for name, _, version in (each.partition("==") for each in MERGEKIT)}
    return measured(what, PEER, CODE, summary(raw(runs)), raw(runs), versions=peers)


def page(record: Record) -> str:
    """Return the page of a record."""
    return (
        "# moeify convert against mergekit-moe\n\n"
        f"{record.what}.\n"
        "Run by turns, the disk flushed before each run, nothing verified on either side.\n"
        f"{record.line()}\n\n"
        f"{table(record.summary, PEER)}\n"
    )


def main() -> None:
    """Install, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True, help="where mergekit is, or will be, installed")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="a folder with 7 GiB free")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    need_space(args.work, 7)
    mergekit = install_mergekit(args.venv.expanduser().resolve())
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        keep(__file__, compare(Path(work), mergekit, args.repeats), page)


if __name__ == "__main__":
    main()
