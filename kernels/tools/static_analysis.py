"""What a compiled kernel will use on a GPU, read from its machine code without a GPU.

Triton brings the assembler and the disassembler for NVIDIA; for AMD the assembly text states its resources.
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

from moeify.kernels.gpu.target import SHARED_MEMORY
from moeify.kernels.gpu.tiles import Tile

REGISTERS = 65536  # of one multiprocessor
RESERVED = 1024  # bytes of shared memory that the system takes for each block
WARPS = {"sm_86": 48, "sm_89": 48, "sm_120": 48}  # of one multiprocessor; others have 64

TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "QMMA", "QGMMA", "UTCQMMA", "DMMA", "v_mfma")  # Q: of 8 bits
PRODUCT = re.compile(rf"\s(?:{'|'.join(TENSOR_CORES)})\b")
WAIT = re.compile(r"\bDEPBAR\.LE SB0, (0x[0-9a-f]+)")
ASYNC_COPIES = ("LDGSTS", "UTMALDG", "buffer_load", "global_load")


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one architecture.

    Attributes:
        registers: Per thread.
        spill: Bytes of stack per thread; these kernels have no other use for one.
        shared: Bytes per block.
        fits: Whether `shared` is within the limit.
        ctas: Blocks that one multiprocessor can hold; on AMD, waves per SIMD.
        tensor_ops: Tensor-core instructions by name.
        async_copies: Asynchronous copies by name; on AMD, vector loads.
        loop_ratio: Instructions per tensor-core instruction in the innermost loop that has any.
        in_flight: Groups of asynchronous copies that the same loop leaves in flight when it waits for the next blocks;
            None if it waits otherwise.
    """

    registers: int
    spill: int
    shared: int
    fits: bool
    ctas: int
    tensor_ops: dict[str, int]
    async_copies: dict[str, int]
    loop_ratio: float
    in_flight: int | None = None


def compile_kernel(kernel: Any, arguments: dict[str, Any], architecture: str, tile: Tile) -> Any:
    """Compile without a driver.

    Args:
        kernel: A `triton.jit` function.
        arguments: For each name its type ("*bf16", "i32") or its compile-time value.
        architecture: "sm_90", "gfx942", …
        tile: The schedule; its sides are among the arguments.
    """
    names = list(kernel.arg_names)
    signature = {n: arguments[n] if _is_type(arguments[n]) else "constexpr" for n in names}
    constants = {n: arguments[n] for n in names if signature[n] == "constexpr"}
    # Pointers, strides and widths are multiples of 16: else loads are scalar and nothing is asynchronous.
    aligned = [i for i, n in enumerate(names) if signature[n][0] in "*i" and n != "tiles"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    # Fused multiply-add is what Triton up to 3.9 does unasked; later ones ask for it to be said.
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def resources(compiled: Any, architecture: str) -> Resources:
    """Read the resources of a compiled kernel."""
    return _amd(compiled, architecture) if architecture.startswith("gfx") else _nvidia(compiled, architecture)


def _is_type(value: Any) -> bool:
    return (
        isinstance(value, str)
        and re.fullmatch(r"\*?(bf16|fp16|fp32|i32|i64)|\*(fp8e4nv|u8)|tensordesc<.*>", value) is not None
    )


def _nvidia(compiled: Any, architecture: str) -> Resources:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", cubin)
        code = _run(tools / "nvdisasm", "-c", cubin)
    registers, shared, warps = int(_first(r"REG:(\d+)", usage)), compiled.metadata.shared, compiled.metadata.num_warps
    limit = SHARED_MEMORY[architecture]
    warp_registers = -(-registers * 32 // 256) * 256  # allocated 256 at a time
    blocks = REGISTERS // (warp_registers * warps), WARPS.get(architecture, 64) // warps
    ctas = min(*blocks, (limit + RESERVED) // (shared + RESERVED))
    loop = _inner_loop(code)
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code)
    return Resources(
        registers=registers,
        spill=int(_first(r"STACK:(\d+)", usage)),
        shared=shared,
        fits=shared <= limit,
        ctas=ctas,
        tensor_ops=_count(instructions, TENSOR_CORES),
        async_copies=_count(instructions, ASYNC_COPIES),
        loop_ratio=len(loop) / _products(loop) if loop else 0.0,
        in_flight=min((int(found[1], 16) for line in loop if (found := WAIT.search(line))), default=None),
    )


def _amd(compiled: Any, architecture: str) -> Resources:
    code, shared = compiled.asm["amdgcn"], compiled.metadata.shared
    instructions = re.findall(r"^\s+([a-z]\w+)", code, re.M)
    groups = ["v_mfma" if i.startswith("v_mfma") else re.sub(r"_load_.*", "_load", i) for i in instructions]
    return Resources(
        registers=int(_first(r"\.vgpr_count:\s+(\d+)", code)),
        spill=4 * int(_first(r"\.vgpr_spill_count:\s+(\d+)", code)),
        shared=shared,
        fits=shared <= SHARED_MEMORY[architecture],
        ctas=int(_first(r"Occupancy:\s+(\d+)", code)),
        tensor_ops=_count(groups, TENSOR_CORES),
        async_copies=_count(groups, ASYNC_COPIES),
        loop_ratio=0.0,
    )


def _inner_loop(code: str) -> list[str]:
    """Return the instructions of the shortest loop that has one for tensor cores; none if there is no such loop."""
    lines = [line for line in code.splitlines() if re.search(r"^\.L_x_\d+:|/\*[0-9a-f]{4,}\*/\s+\S", line)]
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"^(\.L_x_\d+):", line))}
    loops = []
    for end, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        start = labels.get(target[1], end) if target else end
        body = [other for other in lines[start : end + 1] if not other.startswith(".L")]
        if start < end and _products(body):
            loops.append(body)
    return min(loops, key=len, default=[])


def _products(lines: list[str]) -> int:
    return sum(bool(PRODUCT.search(line)) for line in lines)


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
