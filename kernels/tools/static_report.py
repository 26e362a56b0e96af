"""Compile every kernel and tile for every architecture and write what the machine code says.

    python -m moeify.kernels.tools.static_report docs/kernels.md          write the tables into the document
    python -m moeify.kernels.tools.static_report --check sm_80 sm_90      only check the table of tiles

Needs no GPU. Exit code 1 if a tile in the table spills, does not fit or misses the tensor cores, or if the loop of the
up projection takes many more instructions per product than that of a plain product.
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path

from moeify.kernels.tools.cases import Entry, entries, faults, slow_loops

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
START, END = "<!-- static report: start -->", "<!-- static report: end -->"
HEADER = (
    "| kernel | tile | warps | stages | registers | spill | shared | CTAs/SM | tensor cores | loads | per product "
    "| in flight |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def row(entry: Entry) -> str:
    """Return one line of the report."""
    case, tile, found = entry.case, entry.tile, entry.found
    name = case.name if entry.kind == "bf16" else f"{case.name}, {entry.kind}"
    shape = "x".join(str(side) for side in (tile.m, tile.n, tile.k) if side)
    resources = found.registers, found.spill, found.shared, found.ctas
    instructions = [", ".join(f"{n} {op}" for op, n in ops.items()) for ops in (found.tensor_ops, found.async_copies)]
    ratio = f"{found.loop_ratio:.1f}" if found.loop_ratio else ""
    in_flight = "" if found.in_flight is None else found.in_flight
    cells = name, shape, tile.warps, tile.stages, *resources, *instructions, ratio, in_flight
    return "| " + " | ".join(map(str, cells)) + " |"


def main(arguments: list[str]) -> int:
    """Report or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", nargs="?", type=Path, default="docs/kernels.md", help="where the tables go")
    parser.add_argument(
        "--check", nargs="*", metavar="ARCHITECTURE", help="only check these architectures; none is all"
    )
    options = parser.parse_args(arguments)
    wrong, text = list[str](), list[str]()
    for architecture in options.check or ARCHITECTURES:
        text += [f"### {architecture}", "", *HEADER]
        found = []
        for entry in entries(architecture):
            found.append(entry)
            text.append(row(entry))
            sys.stderr.write(f"{architecture} {text[-1]}\n")
        wrong += [f"{architecture} {fault}" for fault in [*chain.from_iterable(map(faults, found)), *slow_loops(found)]]
        text.append("")
    sys.stderr.writelines(f"{fault}\n" for fault in wrong)
    if options.check is None:
        before, _, rest = options.document.read_text().partition(START)
        options.document.write_text(before + START + "\n\n" + "\n".join(text) + END + rest.partition(END)[2])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
