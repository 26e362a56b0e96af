"""`moeify convert` against `mergekit-moe`: SmolLM2-135M in fp32 becomes a Mixtral of 8 equal experts.

    python -m benchmarks.convert_vs_mergekit --venv ~/.cache/mergekit-venv

mergekit is installed into an environment of its own the first time. The table is printed, and written beside this file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from benchmarks.measure import Command, by_turns, machine, need_space, table

HERE = Path(__file__)
MERGEKIT = ("mergekit==0.1.5", "torch==2.13.0")
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


def compare(work: Path, mergekit: Path, repeats: int) -> str:
    """The report, in Markdown."""
    src = work / "smollm2"
    subprocess.run([sys.executable, HERE.with_name("make_checkpoint.py"), "smollm2", src], check=True)
    config = work / "mergekit.yaml"
    config.write_text(CONFIG.format(src=src) + f"  - source_model: {src}\n" * 8)
    ours, theirs = work / "ours", work / "theirs"
    convert = ("convert", src, ours, "--experts", "8", "--top-k", "2", "--to", "mixtral", "--no-verify")
    merge = (mergekit, config, theirs, "--i-understand-this-is-not-useful-without-training")
    runs = by_turns(
        [
            Command("moeify convert", (sys.executable, "-m", "moeify", *convert), ours),
            Command("mergekit-moe", merge, theirs),
        ],
        repeats,
    )
    return (
        "# moeify convert against mergekit-moe\n\n"
        f"SmolLM2-135M, fp32 safetensors → Mixtral, 8 experts, top-2; {' and '.join(MERGEKIT)}. {machine()}.\n"
        "Run by turns, the disk flushed before each run, nothing verified on either side.\n\n"
        f"{table(runs, against='mergekit-moe')}\n"
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
        report = compare(Path(work), mergekit, args.repeats)
    HERE.with_suffix(".md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
