"""What a compiled kernel will use on a GPU, read from its machine code on a machine that has none.

Triton carries the assembler and the disassembler for NVIDIA; for AMD the assembly text states its resources.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moeify.kernels.tiles import Tile


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor has. Shared memory in bytes: per block (opt-in) and in all."""

    block_shared: int
    shared: int
    warps: int
    registers: int = 65536


# CUDA C++ programming guide, "Technical specifications per compute capability".
LIMITS = {
    80: Limits(166912, 167936, 64),
    86: Limits(101376, 102400, 48),
    89: Limits(101376, 102400, 48),
    90: Limits(232448, 233472, 64),
    100: Limits(232448, 233472, 64),
    120: Limits(101376, 102400, 48),
}
AMD_LDS = {"gfx942": 65536, "gfx950": 163840}

TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "DMMA", "v_mfma")
ASYNC_COPIES = ("LDGSTS", "UTMALDG", "buffer_load", "global_load")


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one architecture.

    Attributes:
        registers: per thread.
        spill: bytes of stack per thread; these kernels have no other use for one.
        shared: bytes per block.
        fits: whether that is within the limit.
        ctas: blocks that one multiprocessor can hold (compute unit, on AMD: waves per SIMD).
        tensor_ops: tensor-core instructions by name.
        async_copies: asynchronous copies by name (on AMD: vector loads).
        loop_ratio: instructions per tensor-core instruction in the innermost loop that has any.
    """

    registers: int
    spill: int
    shared: int
    fits: bool
    ctas: int
    tensor_ops: dict[str, int]
    async_copies: dict[str, int]
    loop_ratio: float


def compile_kernel(kernel: Any, arguments: dict[str, Any], architecture: str, tile: Tile) -> Any:
    """Compile without a driver. `arguments`: each name's type ("*bf16", "i32") or its compile-time value."""
    names = list(kernel.arg_names)
    signature = {n: arguments[n] if _is_type(arguments[n]) else "constexpr" for n in names}
    constants = {n: arguments[n] for n in names if signature[n] == "constexpr"}
    # Pointers, strides and widths are multiples of 16: else loads are scalar and nothing is asynchronous.
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or n != "tiles"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if signature[names[i]] != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    return triton.compile(source, target=target, options={"num_warps": tile.warps, "num_stages": tile.stages})


def resources(compiled: Any, architecture: str) -> Resources:
    """Read the resources of a compiled kernel."""
    if architecture.startswith("gfx"):
        return _amd(compiled, architecture)
    return _nvidia(compiled, int(architecture[3:]))


def _is_type(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\*?(bf16|fp16|fp32|i32|i64)", value) is not None


def _nvidia(compiled: Any, capability: int) -> Resources:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", cubin)
        code = _run(tools / "nvdisasm", "-c", cubin)
    registers, shared, warps = int(_first(r"REG:(\d+)", usage)), compiled.metadata.shared, compiled.metadata.num_warps
    limits = LIMITS[capability]
    warp_registers = -(-registers * 32 // 256) * 256  # allocated 256 at a time
    ctas = min(limits.registers // (warp_registers * warps), limits.warps // warps, limits.shared // (shared + 1024))
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code)
    return Resources(
        registers=registers,
        spill=int(_first(r"STACK:(\d+)", usage)),
        shared=shared,
        fits=shared <= limits.block_shared,
        ctas=ctas,
        tensor_ops=_count(instructions, TENSOR_CORES),
        async_copies=_count(instructions, ASYNC_COPIES),
        loop_ratio=_loop_ratio(code),
    )


def _amd(compiled: Any, architecture: str) -> Resources:
    code, shared = compiled.asm["amdgcn"], compiled.metadata.shared
    instructions = re.findall(r"^\s+([a-z]\w+)", code, re.M)
    groups = ["v_mfma" if i.startswith("v_mfma") else re.sub(r"_load_.*", "_load", i) for i in instructions]
    return Resources(
        registers=int(_first(r"\.vgpr_count:\s+(\d+)", code)),
        spill=4 * int(_first(r"\.vgpr_spill_count:\s+(\d+)", code)),
        shared=shared,
        fits=shared <= AMD_LDS[architecture],
        ctas=int(_first(r"Occupancy:\s+(\d+)", code)),
        tensor_ops=_count(groups, TENSOR_CORES),
        async_copies=_count(groups, ASYNC_COPIES),
        loop_ratio=0.0,
    )


def _loop_ratio(code: str) -> float:
    """Instructions per tensor-core instruction in the shortest backward branch around one; 0 if there is none."""
    lines = [line for line in code.splitlines() if re.search(r"^\.L_x_\d+:|/\*[0-9a-f]{4,}\*/\s+\S", line)]
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"^(\.L_x_\d+):", line))}
    loops = []
    for end, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        start = labels.get(target[1], end) if target else end
        body = [other for other in lines[start : end + 1] if not other.startswith(".L")]
        products = sum(bool(re.search(r"\s(?:HMMA|HGMMA|UTCHMMA|DMMA)\b", other)) for other in body)
        if start < end and products:
            loops.append((len(body), products))
    return min((length / products for length, products in sorted(loops)[:1]), default=0.0)


def _run(*command: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output lacks {pattern!r}: expected Triton 3.2 or newer; update this reader")
    return found[1]


def _count(names: list[str], wanted: tuple[str, ...]) -> dict[str, int]:
    return {w: names.count(w) for w in wanted if w in names}
