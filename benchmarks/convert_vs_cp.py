"""`moeify convert` against the disk: a Llama of a billion parameters becomes 13 GB of MoE, beside `cp -r` of the same.

    python -m benchmarks.convert_vs_cp --work FOLDER                 # --layers 3 makes 3 GB of it

The peak memory is also measured on one layer of that model, 1 GB of output. Record and page are written beside this
file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.measure import Command, by_turns, make_checkpoint, measure, medians, need_space, raw, table
from benchmarks.record import Record, keep, measured

PEER = "cp -r"
CODE = ("moeify/checkpoint", "moeify/conversion", "moeify/cli/writing.py")
summary = partial(medians, against=PEER)


def convert(name: str, src: Path, out: Path, *more: str) -> Command:
    """The conversion that is measured."""
    options = ("--experts", "8", "--top-k", "2", "--to", "mixtral", "--no-verify", "--shard-size", "1GB", *more)
    return Command(name, (sys.executable, "-m", "moeify", "convert", src, out, *options), out)


def compare(work: Path, repeats: int, layers: int) -> Record:
    """Return what was measured."""
    small = make_checkpoint("llama-1b", work / "one-layer", layers=1)
    one_layer = convert("moeify convert, 1 layer", small, work / "one-layer-moe")
    runs = by_turns([one_layer], repeats)
    source = make_checkpoint("llama-1b", work / "dense", layers=layers)
    made = convert("the output to copy", source, work / "made")
    measure(made)
    copy = Command(PEER, ("cp", "-r", made.out, work / "copy"), work / "copy")
    commands = [
        convert("moeify convert", source, work / "moe"),
        convert("… --workers 2", source, work / "moe", "--workers", "2"),
        copy,
    ]
    runs |= by_turns(commands, repeats)
    noise = ("--method", "noise")
    drawn = [  # 13 GB take minutes, and the disk has no part in it
        convert("… 1 layer, --method noise", small, work / "moe", *noise),
        convert("… 1 layer, --method noise --workers 2", small, work / "moe", *noise, "--workers", "2"),
    ]
    runs |= by_turns(drawn, repeats)
    what = (
        f"Llama (hidden 2048, intermediate 8192, vocab_size 32000; random bf16 weights), {layers} layers → Mixtral, "
        "8 experts, top-2"
    )
    return measured(what, PEER, CODE, summary(raw(runs)), raw(runs))


def page(record: Record) -> str:
    """Return the page of a record."""
    return (
        "# moeify convert against cp\n\n"
        f"{record.what}.\n"
        "`cp -r` copies the same output. Run by turns, the disk flushed before each run.\n"
        f"{record.line()}\n\n"
        f"{table(record.summary, PEER)}\n"
    )


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="a folder with 32 GiB free")
    parser.add_argument("--layers", type=int, default=16, help="of the model; 16 for 13 GB of output")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    need_space(args.work, 2 * args.layers)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        keep(__file__, compare(Path(work), args.repeats, args.layers), page)


if __name__ == "__main__":
    main()
