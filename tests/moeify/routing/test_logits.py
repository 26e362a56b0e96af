from __future__ import annotations

import math

import pytest
import torch

from moeify.routing.logits import at_least_fp32, jitter_inputs, router_init, router_logits
from tests.moeify.routers.by_hand import close
from tests.moeify.routing.draw import randn


def test_router_init_is_a_function_of_seed_and_name() -> None:
    first = router_init((7, 33), 3, "layers.0.router")
    torch.randn(10)
    router_init((7, 33), 3, "layers.1.router")
    with torch.device("meta"):
        again = router_init((7, 33), 3, "layers.0.router")
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.equal(first, router_init((7, 33), 4, "layers.0.router"))
    assert not torch.equal(first, router_init((7, 33), 3, "layers.1.router"))


def test_router_init_never_changes() -> None:
    # Conversions are resumed and compared by these values.
    expected = [[0.2849939, -0.01470575, -1.0194409], [-0.36348554, 0.25344881, 1.291885]]
    close(router_init((2, 3), 0, "router"), expected)


@pytest.mark.parametrize("width", [48, 1031])
def test_router_init_gives_logits_of_standard_deviation_one(width: int) -> None:
    weight = router_init((64, width), 0, "a")
    assert abs(float(weight.std()) * math.sqrt(width) - 1) < 0.05
    x = randn(500, width)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    assert abs(float(router_logits(x, weight).std()) - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_float32_also_under_autocast(dtype: torch.dtype) -> None:
    x, weight = randn(11, 37, dtype=dtype), randn(5, 37, seed=1, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router_logits(x, weight)
    assert logits.dtype == torch.float32
    close(logits, x.double() @ weight.double().t())


def test_jitter_multiplies_the_input_uniformly() -> None:
    x = torch.full((100, 101), 3.0, dtype=torch.bfloat16)
    torch.manual_seed(0)
    factors = jitter_inputs(x, 0.01) / 3
    assert factors.dtype == torch.float32
    assert 0.99 - 1e-6 <= float(factors.min()) < 0.9901
    assert 1.0099 < float(factors.max()) <= 1.01 + 1e-6
    assert abs(float(factors.mean()) - 1) < 3e-4


def test_float64_stays_what_it_is() -> None:
    for dtype in (torch.float32, torch.float64):
        x = randn(3, 4, dtype=dtype)
        assert at_least_fp32(x) is x
    assert at_least_fp32(randn(3, dtype=torch.bfloat16)).dtype == torch.float32
    assert router_logits(randn(3, 4, dtype=torch.float64), randn(2, 4, dtype=torch.float64)).dtype == torch.float64
