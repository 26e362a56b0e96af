"""A driver that is not there: kernels go through Triton's own specialisation of arguments and compile for a GPU."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class NoDriver:
    """Enough of a driver for a kernel to be specialised and compiled."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)  # kernels are cached by device: one for each architecture

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextmanager
def no_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, Any]]]:
    """What is launched meanwhile on an sm_90 that is not there: kernel, programs, compiled code."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    seen: list[tuple[str, int, Any]] = []
    compile_and_launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        seen.append((self.__name__, torch.Size(grid).numel(), compiled))
        return compiled

    monkeypatch.setattr(JITFunction, "run", run)
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(NoDriver(GPUTarget("cuda", 90, 32)))
    try:
        yield seen
    finally:
        triton.runtime.driver._active = active
