"""Compile every kernel and tile for every architecture and write what the machine code says.

    python -m moeify.kernels.static_report docs/kernels.md      write the tables into the document
    python -m moeify.kernels.static_report --check sm_80 sm_90  only check the table of tiles on these architectures

Needs no GPU. Exit code 1 if a tile in the table spills, does not fit or misses the tensor cores, or if the loop of the
up-projection takes more instructions per product than that of a plain one, `DENSE_MARGIN` aside.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton up to 3.9 does unasked; read when it is imported

import torch
import triton
import triton.language as tl

from moeify.kernels import accounting, static_analysis, triton_blocksparse, triton_gemm, triton_layout
from moeify.kernels.static_analysis import Resources
from moeify.kernels.tiles import TILES, Tile, block_tile, choose, row_tile

HIDDEN, INNER, TOP_K = 2048, 768, 8  # the experts of Qwen3-30B-A3B, the shape that other kernels publish
ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
KINDS = {"bf16": ("bf16", "ieee"), "fp32": ("fp32", "ieee"), "tf32": ("fp32", "tf32")}  # type and kind of product
DENSE_MARGIN = 1.15
INT_POINTERS = {
    *("ORDER", "INVERSE", "OFFSETS", "TILE_EXPERT", "TILE_ROW", "VALID", "COUNTS", "STARTS"),
    *("EXPERT", "FIRST_ROW", "ROW", "COLUMN", "COLUMN_OFFSETS", "COLUMN_BLOCKS"),
}
START, END = "<!-- static report: start -->", "<!-- static report: end -->"


@triton.jit
def dense_kernel(
    A, B, C, stride_a, stride_b, depth, N: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """C = A B^T, the plain product that the others are held against: no experts, no gather, no epilogue."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a_ptr = A + m[:, None] * stride_a + k[None, :]
    b_ptr = B + n[None, :] * stride_b + k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, depth, BK):
        acc = tl.dot(tl.load(a_ptr), tl.load(b_ptr), acc, input_precision=PRECISION)
        a_ptr += BK
        b_ptr += BK
    tl.store(C + m[:, None] * N + n[None, :], acc.to(C.dtype.element_ty))


@dataclass(frozen=True)
class Case:
    """One use of a kernel and what is known when it is compiled.

    Attributes:
        name: in the report.
        kernel: compiled with the tiles of `table`, or with `tiles` where the table says nothing.
        table: the kernel's name in the table of tiles.
        constants: arguments by name: values, or types of those that `_type` would take for something else.
        tiles: as above.
        products: whether it multiplies matrices.
    """

    name: str
    kernel: Any
    table: str
    constants: dict[str, Any]
    tiles: tuple[Tile, ...] = ()
    products: bool = True


def _sparse(name: str, kernel: Any, free: str, width: int | None) -> Iterator[Case]:
    """A block-sparse product with operands as they lie in a forward pass; `free` is the size known at run time."""
    strides = dict.fromkeys(("stride_ak", "stride_bk", "stride_dm", "stride_on"), 1)
    for block in (16, 64, 128):
        constants = {"F": INNER, "G": -(-INNER // block), free: "i32"} | strides
        yield Case(name, kernel, "", constants, (block_tile(block, width or block, 2),))


_FFN = {"HIDDEN": HIDDEN, "INNER": INNER, "TOP_K": TOP_K, "ACTIVATION": "silu", "GATED": True}
_TOKENS = {"N": HIDDEN, "TOP_K": TOP_K, "WEIGHTED": True}
_ROUTING = {"E": 128, "X": 256, "IDS": "*i64"}
_SUM = {"TOP_K": TOP_K, "GATHER_L": False, "GATHER_R": False}
CASES = (
    Case("up", triton_gemm.up_kernel, "up", _FFN | {"HAS_BIAS": False, "KEEP": True, "stride_wk": 1}),
    Case("down", triton_gemm.rows_kernel, "rows", {"N": HIDDEN, "HAS_BIAS": False, "stride_wk": 1}),
    Case("d input", triton_gemm.rows_kernel, "rows", {"N": HIDDEN, "HAS_BIAS": False, "stride_wn": 1}),
    Case("d hidden", triton_gemm.down_backward_kernel, "down_backward", _FFN | {"stride_wn": 1}),
    Case("d up", triton_gemm.weights_kernel, "weights", _SUM | {"M": 2 * INNER, "N": HIDDEN, "GATHER_R": True}),
    Case("(dense)", dense_kernel, "up", {"N": HIDDEN}),
    Case("d down", triton_gemm.weights_kernel, "weights", _SUM | {"M": HIDDEN, "N": INNER, "GATHER_L": True}),
    *_sparse("sdd", triton_blocksparse.sdd_kernel, "K", None),
    *_sparse("dsd", triton_blocksparse.dsd_kernel, "M", 64),
    *_sparse("dsd^T", triton_blocksparse.dsd_transposed_kernel, "M", 64),
    Case("d bias", triton_gemm.bias_kernel, "", _TOKENS | {"GATHER": True}, (Tile(0, 64, 32, 4, 3),), False),
    Case("combine", triton_gemm.combine_kernel, "", _TOKENS, (Tile(0, 1024, 0, 4, 3),), False),
    Case("count", triton_layout.count_kernel, "", _ROUTING, (Tile(32, 0, 0, 4, 3),), False),
    Case("place", triton_layout.place_kernel, "", _ROUTING, (Tile(32, 0, 0, 4, 3),), False),
    Case("tile map", triton_layout.tile_map_kernel, "", _ROUTING | {"X": 128}, (Tile(64, 0, 0, 4, 3),), False),
)


@dataclass(frozen=True)
class Entry:
    """One line of the report: a case in one of `KINDS`, its tile, and what the machine code says."""

    case: Case
    kind: str
    tile: Tile
    found: Resources


def measure(case: Case, tile: Tile, architecture: str, kind: str = "bf16") -> Resources:
    """Compile one case with one tile and read its resources."""
    dtype, precision = KINDS[kind]
    known = {"BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP_M": tile.group_m, "PRECISION": precision, "EVEN": True}
    known |= {"BLOCK": tile.m} | case.constants
    arguments = {name: known.get(name, _type(name, dtype)) for name in case.kernel.arg_names}
    return static_analysis.resources(
        static_analysis.compile_kernel(case.kernel, arguments, architecture, tile), architecture
    )


def entries(architecture: str) -> Iterator[Entry]:
    """Every case in every kind with every tile that the table holds for it."""
    for kind, (dtype, _) in KINDS.items():
        if kind == "tf32" and architecture.startswith("gfx"):
            continue  # not used there
        for case in CASES:
            if kind != "bf16" and (case.kernel is dense_kernel or not case.products):
                continue
            itemsize = 4 if dtype == "fp32" else 2
            for tile in _tiles(case, architecture, itemsize):
                yield Entry(case, kind, tile, measure(case, tile, architecture, kind))


def _tiles(case: Case, architecture: str, itemsize: int) -> list[Tile]:
    if case.table:
        heights = TILES[architecture][case.table]
        return [choose(case.table, architecture, m, HIDDEN, HIDDEN, itemsize) for m in heights]
    return [block_tile(tile.m, tile.n, itemsize) if case.products else tile for tile in case.tiles]


def faults(entry: Entry) -> list[str]:
    """What is wrong with a tile, in words; nothing if it belongs in the table."""
    found = entry.found
    checks = {
        f"spills {found.spill} bytes": found.spill > 0,
        f"needs {found.shared} bytes of shared memory": not found.fits,
        "leaves no room for a block": found.ctas < 1,
        "uses no tensor cores": entry.case.products and entry.kind != "fp32" and not found.tensor_ops,
    }
    if entry.case.kernel is dense_kernel:
        return []
    return [f"{entry.case.name} {entry.kind} {entry.tile}: {fault}" for fault, wrong in checks.items() if wrong]


def tile_faults(kernel: str, architecture: str, tile: Tile, itemsize: int) -> list[str]:
    """What is wrong with a tile for any use of `kernel`, a name in the table, with elements of `itemsize` bytes."""
    if architecture not in TILES:
        raise ValueError(f"the limits of {architecture} are not known: expected one of {', '.join(TILES)}; do not tune")
    kinds = ["bf16"] if itemsize == 2 else ["fp32"] if architecture.startswith("gfx") else ["fp32", "tf32"]
    uses = [case for case in CASES if case.table == kernel and case.kernel is not dense_kernel]
    found = (Entry(case, kind, tile, measure(case, tile, architecture, kind)) for case in uses for kind in kinds)
    return next(filter(None, map(faults, found)), [])


def slow_loops(found: list[Entry]) -> list[str]:
    """Tiles of the up-projection whose loop is longer, per product, than the plain kernel's with the same tile."""
    ratios = {(e.case.name, e.tile): e.found.loop_ratio for e in found if e.kind == "bf16"}
    return [
        f"up {tile}: {ratio:.1f} instructions per product, a plain product takes {ratios['(dense)', tile]:.1f}"
        for (name, tile), ratio in ratios.items()
        if name == "up" and ratio > DENSE_MARGIN * ratios["(dense)", tile]
    ]


def row(entry: Entry) -> str:
    """One line of the report."""
    case, tile, found = entry.case, entry.tile, entry.found
    shape = "x".join(str(side) for side in (tile.m, tile.n, tile.k) if side)
    tensor, copies = (
        ", ".join(f"{n} {name}" for name, n in ops.items()) for ops in (found.tensor_ops, found.async_copies)
    )
    ratio = f"{found.loop_ratio:.1f}" if found.loop_ratio else ""
    cells = (
        case.name if entry.kind == "bf16" else f"{case.name}, {entry.kind}",
        shape,
        tile.warps,
        tile.stages,
        found.registers,
        found.spill,
        found.shared,
        found.ctas,
        tensor,
        copies,
    )
    return "| " + " | ".join(str(cell) for cell in (*cells, ratio)) + " |"


def main(arguments: list[str]) -> int:
    """Report or check; return the exit code."""
    checking = arguments[:1] == ["--check"]
    wrong, text = [], []
    for architecture in (arguments[1:] if checking else []) or ARCHITECTURES:
        text += [f"### {architecture}", "", *HEADER]
        found = []
        for entry in entries(architecture):
            found.append(entry)
            text.append(row(entry))
            sys.stderr.write(f"{architecture} {text[-1]}\n")
        wrong += [f"{architecture} {fault}" for fault in [*chain.from_iterable(map(faults, found)), *slow_loops(found)]]
        text.append("")
    text += waste()
    sys.stderr.writelines(f"{fault}\n" for fault in wrong)
    if not checking:
        document = Path(arguments[0] if arguments else "docs/kernels.md")
        before, _, rest = document.read_text().partition(START)
        document.write_text(before + START + "\n\n" + "\n".join(text) + END + rest.partition(END)[2])
    return 1 if wrong else 0


def waste() -> list[str]:
    """Products issued and bytes moved by three arrangements of the work, for several routings."""
    text = [
        f"### Padding (H={HIDDEN}, I={INNER}, forward, bf16; each number over that of the line's best possible)",
        "",
    ]
    text += ["| experts, top-k, tokens | routing | tiles: products | bytes | 128-padding: products | bytes | "
             "capacity 1.25: products | bytes | dropped |", "|---" * 9 + "|"]  # fmt: skip
    for experts, top_k, tokens in ((128, 8, 64), (128, 8, 4096), (128, 8, 32768), (8, 2, 4096)):
        for name, counts in _routings(experts, tokens * top_k).items():
            block = row_tile(tokens * top_k, experts)
            ours = accounting.tiled(counts, tokens, HIDDEN, INNER, block)
            others = (
                accounting.padded(counts, tokens, HIDDEN, INNER),
                accounting.capacity(counts, tokens, HIDDEN, INNER),
            )
            least = accounting.tiled(counts, tokens, HIDDEN, INNER, 1)
            ratios = [f"{c.flops / least.flops:.2f} | {c.bytes / least.bytes:.2f}" for c in (ours, *others)]
            dropped = f"{others[1].dropped / sum(counts):.0%}"
            text.append(" | ".join((f"| {experts}, {top_k}, {tokens}", name, *ratios, dropped)) + " |")
    return [*text, ""]


def _routings(experts: int, pairs: int) -> dict[str, list[int]]:
    """Rows per expert: even; each pair at random; and by Zipf's law."""
    g = torch.Generator().manual_seed(0)
    zipf = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    samples = {
        "uniform": torch.randint(0, experts, (pairs,), generator=g),
        "Zipf": torch.multinomial(zipf, pairs, replacement=True, generator=g),
    }
    even = [pairs // experts + (e < pairs % experts) for e in range(experts)]
    return {"even": even} | {n: torch.bincount(ids, minlength=experts).tolist() for n, ids in samples.items()}


HEADER = (
    "| kernel | tile | warps | stages | registers | spill | shared | CTAs/SM | tensor cores | loads | per product |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def _type(name: str, dtype: str) -> str:
    if name in INT_POINTERS:
        return "*i32"
    if name == "DS":
        return "*fp32"
    return f"*{dtype}" if name.isupper() else "i32"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
