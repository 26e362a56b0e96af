"""Kernels in the Triton interpreter: real kernels, CPU tensors. Run with TRITON_INTERPRET=1.

The interpreter stores bf16 as its bits, multiplies and adds those bits, and truncates when it casts (Triton issues
11584, 11604, 10919). `types_as_on_a_gpu` makes it do what a GPU does: compute in fp32, round to nearest even. Its cast
to e4m3 loses the carry where a number is rounded up to a power of two: torch's stands for it.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/kernels/gpu runs in the Triton interpreter: set TRITON_INTERPRET=1")

import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def widen(handle: Any) -> Any:
    if not is_bf16(handle):
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def narrow(data: Any) -> Any:
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return interpreter.TensorHandle(
        np.where(np.isnan(data), np.uint16(0x7FC0), rounded).reshape(np.shape(data)), tl.bfloat16
    )


@pytest.fixture(autouse=True)
def types_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = interpreter.InterpreterBuilder
    binary, unary, dot = builder.binary_op, builder.unary_op, builder.create_dot
    cast, convert = builder.cast_impl, builder.create_fp_to_fp

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (is_bf16(left) and is_bf16(right)):
            return binary(self, left, right, op)
        out = op(widen(left).data, widen(right).data)
        return interpreter.TensorHandle(out, tl.int1) if op in COMPARISONS else narrow(out)

    def unary_op(self: Any, x: Any, op: Any) -> Any:
        return narrow(op(widen(x).data)) if is_bf16(x) else unary(self, x, op)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if is_bf16(source) and target.scalar != tl.bfloat16:
            return widen(source) if target.scalar == tl.float32 else cast(self, widen(source), target)
        if target.scalar == tl.bfloat16 and not is_bf16(source):
            return narrow(source.data.astype(np.float32))
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.bfloat16 in {source.dtype.scalar, target.scalar} and tl.float32 in {source.dtype.scalar, target.scalar}:
            return cast_impl(self, source, target)
        if (source.dtype.scalar, target.scalar) == (tl.float32, tl.float8e4nv):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
            return interpreter.TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)
        return convert(self, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, widen(a), widen(b), d, *rest)

    for name, function in {
        "binary_op": binary_op,
        "unary_op": unary_op,
        "cast_impl": cast_impl,
        "create_fp_to_fp": create_fp_to_fp,
        "create_dot": create_dot,
    }.items():
        monkeypatch.setattr(builder, name, function)


@pytest.fixture(autouse=True)
def addresses_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a kernel read and write inside its arguments alone: a GPU would not say that it went past their ends."""
    allowed: list[tuple[int, int]] = []
    launch, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        read = [t.base if isinstance(t, TensorDescriptor) else t for t in (*args, *kwargs.values())]
        allowed[:] = [extent(t) for t in read if isinstance(t, torch.Tensor)]
        return launch(self, *args, **kwargs)

    def checked(access: Any, mask_at: int) -> Any:
        def run(self: Any, pointers: Any, *rest: Any, **named: Any) -> Any:
            used = pointers.data[rest[mask_at].data]
            inside = np.zeros(used.shape, bool)
            for start, stop in allowed:
                inside |= (used >= start) & (used < stop)
            assert inside.all(), f"{(~inside).sum()} of {inside.size} addresses are outside the arguments"
            return access(self, pointers, *rest, **named)

        return run

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    for name, mask_at in (("create_masked_load", 0), ("create_masked_store", 1)):
        monkeypatch.setattr(builder, name, checked(getattr(builder, name), mask_at))


def extent(t: torch.Tensor) -> tuple[int, int]:
    """The addresses from the first element of a tensor to past its last one."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + ((last + 1) * t.element_size() if t.numel() else 0)
