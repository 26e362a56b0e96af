"""One yardstick for every check in the library, every test and every benchmark.

It holds the tolerances by dtype, how a difference is measured, how a function is recognized by its values, and random
inputs. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TOLERANCE: dict[str, float] = {
    "float64": 1e-12,
    "float32": 1e-5,
    "bfloat16": 2e-2,
    "float16": 3e-3,
}
"""The largest relative difference that passes, by the name of the dtype."""

WHOLE_TOLERANCE: dict[str, float] = {
    "float64": 1e-9,
    "float32": 1e-2,
    "bfloat16": 5e-1,
    "float16": 1e-1,
}
"""The same for what a whole model gives, where every layer was held to `TOLERANCE`: rounding piles up over depth."""

_SAME = 2e-6  # a function may hold constants that were rounded to float32
_EQUAL = 1e-13  # up to the rounding of float64
_REACH = 12.0  # beyond it every activation that has a name is linear or constant in float32
_LEAST = 1e-3  # of the largest value: a row that cancels out is measured by this
_GOLDEN = (5**0.5 - 1) / 2


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the largest relative difference that passes for results in `dtype`."""
    return TOLERANCE[name_of(dtype)]


def name_of(dtype: torch.dtype) -> str:
    """Return the name under which the tables have a dtype."""
    return str(dtype).removeprefix("torch.")


def relative_difference(result: Tensor, expected: Tensor) -> float:
    """Return `max|result - expected| / max|expected|`, computed in float64.

    It is NaN if a value is NaN, and the plain difference if everything expected is 0. Empty tensors do not differ.

    Args:
        result: Any shape, any device.
        expected: The same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if result.shape != expected.shape:
        raise ValueError(f"cannot compare a result of shape {tuple(result.shape)} with {tuple(expected.shape)}")
    if not expected.numel():
        return 0.0
    wanted = expected.detach().double()
    difference = (result.detach().to(wanted.device).double() - wanted).abs().max().item()
    return difference / (wanted.abs().max().item() or 1.0)


def row_difference(result: Tensor, expected: Tensor) -> float:
    """Return the largest difference of a row (the last dimension) relative to the largest value there, in float64.

    Of a row that nearly cancels out, relative to a thousandth of the largest value of all. One token with huge values
    cannot hide what is wrong with the others, as it does in `relative_difference`.

    Args:
        result: (…, H).
        expected: The same shape.
    """
    if not expected.numel():
        return 0.0
    wanted = expected.detach().double()
    difference = (result.detach().to(wanted.device).double() - wanted).abs().amax(-1)
    size = wanted.abs().amax(-1)
    size = size.clamp(min=_LEAST * size.max().item())
    return (difference / size.where(size > 0, 1)).max().item()


def without_shared_nan(result: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with 0 where both are NaN, or both infinite with the same sign."""
    found = result.detach().to(expected.device)
    same = (found.isnan() & expected.isnan()) | (found.isinf() & (found == expected))
    return found.masked_fill(same, 0), expected.detach().masked_fill(same, 0)


def top1_agreement(result: Tensor, expected: Tensor) -> float:
    """Return the share of rows (the last dimension) whose largest value is at the same place in both tensors."""
    return (result.argmax(-1) == expected.argmax(-1)).double().mean().item()


def probe(*shape: int, seed: int = 0, reach: float = _REACH) -> Tensor:
    """Return float64 values spread evenly over ±`reach`, in another order for each seed: points to try a function at.

    Args:
        shape: Of the values.
        seed: Two inputs of one function need two seeds.
        reach: Wider than the default where a function may bend further out.
    """
    import torch

    # Named, because a model may be looked at while it is built on the meta device.
    steps = torch.arange(torch.Size(shape).numel(), dtype=torch.float64, device="cpu").reshape(shape)
    return 2 * reach * ((steps * _GOLDEN + 0.37 * seed) % 1) - reach


def same_values(result: Tensor, expected: Tensor, *, exactly: bool = False) -> bool:
    """Whether two functions gave the same values: equal shapes, and equal numbers up to rounding to float32.

    Args:
        result: In float64.
        expected: Likewise.
        exactly: Up to rounding in float64 only: the constants in both are the same.
    """
    if result.shape != expected.shape:
        return False
    limit = _EQUAL if exactly else _SAME
    return bool(((result - expected).abs() <= limit * expected.abs().clamp(min=1)).all())


def recognize(values: Tensor, table: Mapping[str, Callable[..., Tensor]], *points: Tensor) -> str | None:
    """Return the name of the first function in `table` that has these values, or None.

    Args:
        values: What the unknown function gave at `points`.
        table: Known functions by name.
        points: The arguments of the function, from `probe`.
    """
    return next((name for name, known in table.items() if same_values(values, known(*points))), None)


def fill(example: Tensor, generator: torch.Generator, *, name: str = "", ids: range = range(2)) -> Tensor:
    """Return random values of the shape and dtype of `example`, on the CPU.

    Floating-point values are normal and bools are True. Integers are token ids, or, by their name, segments
    (`token_type_ids`) or a mask that ends in some padding (`…mask`).

    Args:
        example: May lie on the meta device.
        generator: Where the random numbers come from.
        name: Of the model's argument.
        ids: The token ids to draw from.
    """
    import torch

    shape, dtype = example.shape, example.dtype
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if dtype is torch.bool:
        return torch.ones(shape, dtype=dtype)
    if name.endswith("mask"):
        lengths = torch.randint(1, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
        return (torch.arange(shape[-1]) < lengths).to(dtype)
    drawn = range(2) if name == "token_type_ids" else ids
    return torch.randint(drawn.start, drawn.stop, shape, generator=generator, dtype=dtype)


def fill_inputs(examples: Mapping[str, object], generator: torch.Generator, ids: range) -> dict[str, object]:
    """Return a model's arguments with random values in place of the tensors that lie on the meta device.

    Args:
        examples: Arguments by name; what is not such a tensor is kept.
        generator: Where the random numbers come from.
        ids: The token ids to draw from.
    """
    import torch

    return {
        name: fill(value, generator, name=name, ids=ids) if isinstance(value, torch.Tensor) and value.is_meta else value
        for name, value in examples.items()
    }
