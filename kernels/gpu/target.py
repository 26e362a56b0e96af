"""The hardware that the kernels run on, and its limits."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton

from moeify.kernels.gpu.math import swizzle

# Bytes that one block can use. NVIDIA: CUDA C++ programming guide, "Technical specifications per compute capability".
SHARED_MEMORY = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
    "gfx950": 163840,
}


TMA = frozenset({"sm_90", "sm_100", "sm_120"})  # copies blocks by tensor descriptor
E4M3 = frozenset({"sm_89", "sm_90", "sm_100", "sm_120"})  # multiplies it, in the form that has no infinities


def interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter, on CPU: TRITON_INTERPRET=1 when it started."""
    return not isinstance(swizzle, triton.JITFunction)


def architecture() -> str:
    """Return what the kernels will run on: "sm_90", "gfx942", or "interpreter"."""
    if interpreted():
        return "interpreter"
    driver = triton.runtime.driver.active
    return _architecture(driver, driver.get_current_device())


@cache
def _architecture(driver: Any, device: int) -> str:
    target = driver.get_current_target()  # of `device`; asking takes longer than a launch may
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def has_tma() -> bool:
    """Whether the hardware copies whole blocks by tensor descriptor, or the interpreter does as if it did."""
    return interpreted() or architecture() in TMA


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many there are; where kernels do not run on hardware, fewer than any has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def has_e4m3() -> bool:
    """Whether the hardware multiplies e4m3."""
    return interpreted() or architecture() in E4M3


def product_precision(dtype: torch.dtype) -> str:
    """Return how products are computed: "tf32" where torch is told so and the hardware has it, else "ieee"."""
    wanted = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if wanted and not architecture().startswith("gfx") else "ieee"  # few AMD GPUs have it
