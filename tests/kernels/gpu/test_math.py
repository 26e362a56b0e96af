# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from moeify.kernels.activations import ACTIVATIONS
from moeify.kernels.gpu.math import activate, swizzle
from moeify.measure import TOLERANCE, probe, relative_difference


@triton.jit
def activate_kernel(X, Y, D, ACTIVATION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    y, d = activate(tl.load(X + i), ACTIVATION)
    tl.store(Y + i, y)
    tl.store(D + i, d)


@triton.jit
def swizzle_kernel(M, N, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    m, n = swizzle(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    tl.store(M + tl.program_id(0), m)
    tl.store(N + tl.program_id(0), n)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # sigmoid of a large negative number is 0
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_of_the_library_and_its_derivative(name: str) -> None:
    x = probe(256).float()
    y, d = torch.empty_like(x), torch.empty_like(x)
    activate_kernel[(1,)](x, y, d, ACTIVATION=name, SIZE=256)
    known = ACTIVATIONS[name]
    assert relative_difference(y, known.forward(x.double())) <= TOLERANCE["float32"]
    assert relative_difference(d, known.backward(torch.ones(256).double(), x.double())) <= TOLERANCE["float32"]


@pytest.mark.parametrize(("tiles_m", "tiles_n", "group"), [(8, 3, 4), (7, 5, 4), (1, 6, 8), (9, 1, 2)])
def test_every_tile_has_one_program(tiles_m: int, tiles_n: int, group: int) -> None:
    m, n = (torch.empty(tiles_m * tiles_n, dtype=torch.int32) for _ in range(2))
    swizzle_kernel[(tiles_m * tiles_n,)](m, n, tiles_m, tiles_n, GROUP_M=group)
    every = {(i, j) for i in range(tiles_m) for j in range(tiles_n)}
    assert set(zip(m.tolist(), n.tolist(), strict=True)) == every
    assert m[: min(group, tiles_m)].tolist() == list(range(min(group, tiles_m))), "a group shares its columns"
