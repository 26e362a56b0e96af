"""Every kernel against the reference, on the hardware at hand: what a machine without a GPU cannot prove.

Shape legend as in `moeify.kernels.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.kernels.layout import routing_layout
from moeify.kernels.ops import experts, grouped_linear
from moeify.kernels.reference import to_blocks, to_dense
from moeify.kernels.topology import block_topology

# Tokens, choices, experts, hidden, inner: whole tiles; ragged widths; a decoding step; all tiles of 128.
SHAPES = ((512, 2, 8, 256, 128), (77, 3, 5, 72, 40), (1, 8, 32, 256, 128), (300, 1, 2, 136, 264))
NAMES = ("x", "weights", "up", "down", "up bias", "down bias")


@dataclass(frozen=True)
class Check:
    """One comparison: max|a - b| / max|b| against float64; for two runs, 0 if their bits are equal, else infinite."""

    name: str
    difference: float


def self_check(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Compare outputs and gradients with the reference in float64, and two runs with each other, bit for bit.

    Args:
        device: a GPU, where the Triton kernels are checked; on any other device the CPU path is.
        dtype: float32, float16 or bfloat16.

    Yields:
        Checks, to be held against the tolerance of their dtype.
    """
    for shape in SHAPES:
        yield from _check_experts(shape, dtype, device)
    yield from _check_grouped_linear(dtype, device)
    if device.type == "cuda":
        yield from _check_blocksparse(dtype, device)


def _check_experts(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    ids, *inputs = _inputs(shape, dtype, device)
    label = "experts " + "x".join(map(str, shape))
    first, second = (_run(ids, inputs, "auto") for _ in range(2))
    exact = _run(ids, [t.double() for t in inputs], "reference")
    for name, got, want in zip(("output", *(f"gradient of {n}" for n in NAMES)), first, exact, strict=True):
        yield Check(f"{label}: {name}", _difference(got, want))
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    yield Check(f"{label}: run twice", 0.0 if same else torch.inf)


def _run(ids: Tensor, inputs: list[Tensor], implementation: str) -> list[Tensor]:
    x, weights, up, down, up_bias, down_bias = leaves = [t.detach().requires_grad_() for t in inputs]
    out = experts(
        x, ids, weights, up, down, up_bias, down_bias, activation="silu", gated=True, implementation=implementation
    )
    return [out, *torch.autograd.grad(out, leaves, x.detach().roll(1, 0))]


def _check_grouped_linear(dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    ids, x, _, up, _, up_bias, _ = _inputs((96, 1, 5, 72, 40), dtype, device)
    offsets = routing_layout(ids, 5).offsets_E1
    got = grouped_linear(x, up, up_bias, offsets)
    want = grouped_linear(x.double(), up.double(), up_bias.double(), offsets, "reference")
    yield Check("grouped linear", _difference(got, want))


def _check_blocksparse(dtype: torch.dtype, device: torch.device) -> Iterator[Check]:
    from moeify.kernels.triton_blocksparse import dds, dsd, sdd

    ids, x, _, up, *_ = _inputs((300, 1, 5, 72, 40), dtype, device)
    topology = block_topology(routing_layout(ids, 5).offsets_E1, 300, 80, 64)
    w = up.reshape(400, 72).t()
    data = sdd(x, w, topology)
    yield Check("sdd", _difference(data, to_blocks(x.double() @ w.double(), topology)))
    sparse = to_dense(data, topology).double()
    products: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "dsd": (lambda: dsd(data, w.t(), topology), sparse @ w.t().double()),
        "dsd transposed": (lambda: dsd(data, x, topology, transpose=True), sparse.t() @ x.double()),
        "dds": (lambda: dds(x.t(), data, topology), x.t().double() @ sparse),
        "dds transposed": (lambda: dds(w, data, topology, transpose=True), w.double() @ sparse.t()),
    }
    for name, (product, want) in products.items():
        yield Check(name, _difference(product(), want))


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Ids, then x, weights, up, down and the biases of a gated FFN, of a size that makes errors visible."""
    tokens, top_k, count, hidden, inner = shape
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, count, (tokens, top_k), generator=g)
    sizes = ((tokens, hidden), (tokens, top_k), (count, 2 * inner, hidden), (count, hidden, inner))
    biases = ((count, 2 * inner), (count, hidden))
    scales = (1.0, 1.0, hidden**-0.5, inner**-0.5, 0.3, 0.3)
    floats = [torch.randn(size, generator=g) * scale for size, scale in zip(sizes + biases, scales, strict=True)]
    return [ids.to(device), *(t.to(device, dtype) for t in floats)]


def _difference(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()
