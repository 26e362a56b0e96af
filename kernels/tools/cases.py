"""The uses of every kernel, compiled with a tile for an architecture, and the faults of that tile.

Shapes are those of Qwen3-30B-A3B's experts, which other kernels publish.
"""

# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from moeify.kernels.gpu import blocksparse, gemm, layout, quantized
from moeify.kernels.gpu.target import E4M3
from moeify.kernels.gpu.tiles import HEIGHTS, SHORT, TILES, Tile, block_tile, choose, quantized_tile
from moeify.kernels.tools import static_analysis
from moeify.kernels.tools.static_analysis import Resources

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 768, 128, 8
KINDS = {"bf16": ("bf16", "ieee"), "fp32": ("fp32", "ieee"), "tf32": ("fp32", "tf32")}  # type and kind of product
DENSE_MARGIN = 1.15
INT_POINTERS = {
    *("ORDER", "INVERSE", "OFFSETS", "TILE_EXPERT", "TILE_ROW", "VALID", "COUNTS", "STARTS"),
    *("EXPERT", "FIRST_ROW", "ROW", "COLUMN", "COLUMN_OFFSETS", "COLUMN_BLOCKS"),
}


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
    """One use of a kernel, with all that is known when it is compiled.

    Attributes:
        name: In the report.
        kernel: From `moeify.kernels.gpu`.
        table: The kernel's name in the table of tiles, or "" if it has no tiles there.
        constants: Arguments by name: values, or types of those that `_type` would take for something else.
        tiles: The tiles of a kernel that is not in the table.
        products: Whether it multiplies matrices.
        only: The architectures that can, if not all can.
    """

    name: str
    kernel: Any
    table: str
    constants: dict[str, Any]
    tiles: tuple[Tile, ...] = ()
    products: bool = True
    only: frozenset[str] | None = None


def _sparse(name: str, kernel: Any, free: str, width: int | None) -> Iterator[Case]:
    """Yield the uses of a block-sparse product; `free` is the size that is known at run time only."""
    strides = dict.fromkeys(("stride_ak", "stride_bk", "stride_dm", "stride_on"), 1)
    for block in (16, 64, 128):
        constants = {"F": INTERMEDIATE, "G": -(-INTERMEDIATE // block), free: "i32"} | strides
        yield Case(name, kernel, "", constants, (block_tile(block, width or block, 2),))


def _quantized(name: str, packed: bool, **constants: Any) -> Case:
    known = {
        "N": HIDDEN,
        "TOP_K": 0,
        "HAS_BIAS": False,
        "GROUP_K": 128,
        "PACKED": packed,
        "W_SCALES": "*fp32",
    } | constants
    return Case(
        name, quantized.quantized_rows_kernel, "", known, tuple(quantized_tile(m, 2 if packed else 1) for m in HEIGHTS),
        only=None if packed else E4M3,
    )  # fmt: skip


_FFN = {"HIDDEN": HIDDEN, "INTERMEDIATE": INTERMEDIATE, "TOP_K": TOP_K, "ACTIVATION": "silu", "GATED": True}
_BY_COLUMN = {"K_MAJOR": True, "stride_wk": 1}  # each column of the weight lies in one piece
_BY_ROW = {"K_MAJOR": False, "stride_wn": 1}
_TOKENS = {"N": HIDDEN, "TOP_K": TOP_K, "WEIGHTED": True}
_ACTIVATE = {"N": INTERMEDIATE, "ACTIVATION": "silu", "GATED": True, "FP8": True, "TOP": 448.0, "Q": "*fp8e4nv",
             "SCALES": "*fp32"}  # fmt: skip
_ROUTING = {"E": EXPERTS, "X": 256, "IDS": "*i64"}
CASES = (
    Case("up", gemm.up_kernel, "up", _FFN | {"HAS_BIAS": False, "KEEP": True} | _BY_COLUMN),
    Case("down", gemm.rows_kernel, "rows", {"N": HIDDEN, "HAS_BIAS": False} | _BY_COLUMN),
    Case("d input", gemm.rows_kernel, "rows", {"N": HIDDEN, "HAS_BIAS": False} | _BY_ROW),
    Case("d hidden", gemm.down_backward_kernel, "down_backward", _FFN | _BY_ROW),
    Case("d up", gemm.weights_kernel, "weights", {"M": 2 * INTERMEDIATE, "N": HIDDEN}),
    Case("(dense)", dense_kernel, "up", {"N": HIDDEN}),
    Case("d down", gemm.weights_kernel, "weights", {"M": HIDDEN, "N": INTERMEDIATE}),
    *_sparse("sdd", blocksparse.sdd_kernel, "K", None),
    *_sparse("dsd", blocksparse.dsd_kernel, "M", 64),
    *_sparse("dsd^T", blocksparse.dsd_transposed_kernel, "M", 64),
    _quantized("e4m3 down", False, P="*fp8e4nv", W="*fp8e4nv", P_SCALES="*fp32", SCALE_N=128, SCALE_K=128),
    _quantized("int4 down", True, W="*u8", SCALE_N=1, SCALE_K=128),
    Case("quantize", quantized.activate_kernel, "", _ACTIVATE, (Tile(16, 128, 0, 4, 3),), False, E4M3),
    Case("gather", gemm.gather_kernel, "", _TOKENS, (Tile(16, 256, 0, 4, 3),), False),
    Case("d bias", gemm.bias_kernel, "", _TOKENS | {"GATHER": True}, (Tile(0, 64, 32, 4, 3),), False),
    Case("combine", gemm.combine_kernel, "", _TOKENS, (Tile(0, 1024, 0, 4, 3),), False),
    Case("count", layout.count_kernel, "", _ROUTING, (Tile(32, 0, 0, 4, 3),), False),
    Case("place", layout.place_kernel, "", _ROUTING, (Tile(32, 0, 0, 4, 3),), False),
    Case("route", layout.route_kernel, "", _ROUTING | {"BM": 16}, (Tile(32, 0, 0, 8, 3),), False),
    Case("tile map", layout.tile_map_kernel, "", _ROUTING | {"X": 128}, (Tile(64, 0, 0, 4, 3),), False),
)


BF16_ONLY = (dense_kernel, quantized.quantized_rows_kernel)


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
    known |= {"BLOCK": tile.m, "TMA": tile.tma, "PERSISTENT": EXPERTS if tile.persistent else 0} | case.constants
    known |= _descriptors(known, tile, dtype) if tile.tma else {}
    arguments = {name: known.get(name, _type(name, dtype)) for name in case.kernel.arg_names}
    return static_analysis.resources(
        static_analysis.compile_kernel(case.kernel, arguments, architecture, tile), architecture
    )


def entries(architecture: str) -> Iterator[Entry]:
    """Yield every case in every kind with every tile that the table has for it."""
    for kind, (dtype, _) in KINDS.items():
        if kind == "tf32" and architecture.startswith("gfx"):
            continue  # not used there
        for case in CASES:
            if case.only is not None and architecture not in case.only:
                continue
            if kind != "bf16" and (case.kernel in BF16_ONLY or not case.products):
                continue
            itemsize = 4 if dtype == "fp32" else 2
            for tile in _tiles(case, architecture, itemsize):
                yield Entry(case, kind, tile, measure(case, tile, architecture, kind))


def _tiles(case: Case, architecture: str, itemsize: int) -> list[Tile]:
    if case.table:
        heights = TILES[architecture][case.table]
        tiles = [choose(case.table, architecture, m, HIDDEN, HIDDEN, itemsize) for m in heights]
        if case.name == "down":
            tiles += [choose("rows", architecture, m, HIDDEN, SHORT, itemsize) for m in heights]
        return list(dict.fromkeys(tiles))
    sparse = case.products and case.kernel not in BF16_ONLY
    halved = case.kernel is blocksparse.dsd_kernel
    return [block_tile(tile.m, tile.n, itemsize, halved) if sparse else tile for tile in case.tiles]


def faults(entry: Entry) -> list[str]:
    """Return what is wrong with a tile, in words; nothing if it belongs in the table."""
    found = entry.found
    checks = {
        f"spills {found.spill} bytes": found.spill > 0,
        f"needs {found.shared} bytes of shared memory": not found.fits,
        "leaves no room for a block": found.ctas < 1,
        "uses no tensor cores": entry.case.products and entry.kind != "fp32" and not found.tensor_ops,
        "waits for all its loads in each turn of its loop": bool(entry.case.table) and found.in_flight == 0,
    }
    if entry.case.kernel is dense_kernel:
        return []
    return [f"{entry.case.name} {entry.kind} {entry.tile}: {fault}" for fault, wrong in checks.items() if wrong]


def tile_faults(kernel: str, architecture: str, tile: Tile, itemsize: int) -> list[str]:
    """Return what is wrong with a tile for any use of a kernel of the table, with elements of `itemsize` bytes."""
    if architecture not in TILES:
        raise ValueError(f"the limits of {architecture} are not known: expected one of {', '.join(TILES)}; do not tune")
    kinds = ["bf16"] if itemsize == 2 else ["fp32"] if architecture.startswith("gfx") else ["fp32", "tf32"]
    uses = [case for case in CASES if case.table == kernel.removeprefix("short_") and case.kernel is not dense_kernel]
    found = (Entry(case, kind, tile, measure(case, tile, architecture, kind)) for case in uses for kind in kinds)
    return next(filter(None, map(faults, found)), [])


def slow_loops(found: list[Entry]) -> list[str]:
    """Return the tiles of the up projection whose loop is too long, per product, beside that of a plain product."""
    ratios = {(e.case.name, e.tile): e.found.loop_ratio for e in found if e.kind == "bf16"}
    return [
        f"up {tile}: {ratio:.1f} instructions per product, a plain product takes {ratios['(dense)', tile]:.1f}"
        for (name, tile), ratio in ratios.items()
        if name == "up" and ratio > DENSE_MARGIN * ratios["(dense)", tile]
    ]


def _descriptors(known: dict[str, Any], tile: Tile, dtype: str) -> dict[str, str]:
    """Return the types of the arguments that are tensor descriptors, for whichever kernel has them."""
    weight = (tile.n, tile.k) if known.get("K_MAJOR") else (tile.k, tile.n)
    blocks = {"W": (1, *weight), "P": (tile.m, tile.k), "L_TILES": (tile.k, tile.m), "R_TILES": (tile.k, tile.n)}
    return {name: f"tensordesc<{dtype}{list(block)}>" for name, block in blocks.items()}


def _type(name: str, dtype: str) -> str:
    if name in INT_POINTERS:
        return "*i32"
    if name == "DS":
        return "*fp32"
    return f"*{dtype}" if name.isupper() else "i32"
