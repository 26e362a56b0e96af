"""`moeify convert` against the disk: a Llama of a billion parameters becomes 13 GB of MoE, beside `cp -r` of the same.

    python -m benchmarks.convert_vs_cp --work FOLDER

The peak memory is also measured on one layer of that model, 1 GB of output. The table is printed, and written beside
this file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Command, by_turns, machine, measure, need_space, table

HERE = Path(__file__)


def make_source(dst: Path, layers: int) -> Path:
    """A dense checkpoint, made in a process of its own."""
    program = HERE.with_name("make_checkpoint.py")
    subprocess.run([sys.executable, program, "llama-1b", dst, "--layers", str(layers)], check=True)
    return dst


def convert(name: str, src: Path, out: Path) -> Command:
    """The conversion that is measured."""
    options = ("--experts", "8", "--top-k", "2", "--to", "mixtral", "--no-verify")
    return Command(name, (sys.executable, "-m", "moeify", "convert", src, out, *options), out)


def compare(work: Path, repeats: int) -> str:
    """The report, in Markdown."""
    one_layer = convert("moeify convert, 1 layer", make_source(work / "one-layer", 1), work / "one-layer-moe")
    runs = by_turns([one_layer], repeats)
    source = make_source(work / "dense", 16)
    made = convert("the output to copy", source, work / "made")
    measure(made)
    copy = Command("cp -r", ("cp", "-r", made.out, work / "copy"), work / "copy")
    runs |= by_turns([convert("moeify convert", source, work / "moe"), copy], repeats)
    return (
        "# moeify convert against cp\n\n"
        "Llama (hidden 2048, intermediate 8192, vocabulary 32000, 16 layers; random bf16 weights in three shards)\n"
        f"→ Mixtral, 8 experts, top-2. {machine()}.\n"
        "`cp -r` copies the same output. Run by turns, the disk flushed before each run.\n\n"
        f"{table(runs, against='cp -r')}\n"
    )


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="a folder with 32 GiB free")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    need_space(args.work, 32)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        report = compare(Path(work), args.repeats)
    HERE.with_suffix(".md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
