"""A driver that is not there: kernels go through Triton's own specialization of arguments, and compile for a GPU."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

Launched = Callable[[str, tuple[int, ...], Any], None]


class NoDriver:
    """Enough of a driver for a kernel to be specialized and compiled."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        """Return what is compiled for."""
        return self.target

    def get_current_device(self) -> int:
        """Return a device of its own for each architecture, because kernels are cached by device."""
        return int(self.target.arch)

    def get_current_stream(self, device: int = 0) -> int:
        """Return a stream that nothing is sent to."""
        return 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        """Return a type as it is: no launcher is compiled."""
        return kind


@contextmanager
def compile_only(capability: int = 90, launched: Launched | None = None) -> Iterator[None]:
    """Inside the block every launch compiles and does not run.

    Args:
        capability: 90 stands for sm_90.
        launched: Is told of each launch: the kernel's name, the grid, and the compiled code.
    """
    run = JITFunction.run

    def compile_(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        if launched is not None:
            launched(self.__name__, tuple(grid), compiled)
        return compiled

    active = triton.runtime.driver._active
    JITFunction.run = compile_
    triton.runtime.driver.set_active(NoDriver(GPUTarget("cuda", capability, 32)))
    try:
        yield
    finally:
        JITFunction.run, triton.runtime.driver._active = run, active
