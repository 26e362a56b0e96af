from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeify.config import MoEConfig
from moeify.errors import ConfigError
from moeify.routers.soft import Soft, SoftRouter, soft_moe
from tests.moeify.routers.by_hand import close
from tests.moeify.routing.draw import randn


def test_soft_moe() -> None:
    x, slots, scale = randn(2, 9, 11), randn(6, 11, seed=1), torch.tensor(3.0)
    routing = soft_moe(x, slots, scale)
    for b in range(2):
        cosines = torch.zeros(9, 6, dtype=torch.float64)
        for t in range(9):
            for s in range(6):
                token, slot = x[b, t].double(), slots[s].double()
                cosines[t, s] = token @ slot / (token.norm() + 1e-6) / (slot.norm() + 1e-6)
        weights = (3 * cosines).exp()
        close(routing.dispatch_TS[b], weights / weights.sum(0, keepdim=True))
        close(routing.combine_TS[b], weights / weights.sum(1, keepdim=True))


def test_soft_moe_leaves_padding_out() -> None:
    x, slots, scale = randn(9, 11), randn(6, 11, seed=1), torch.tensor(1.0)
    real = torch.tensor([True, False, True, True, False, True, True, True, True])
    routing, without = soft_moe(x, slots, scale, mask_T=real), soft_moe(x[real], slots, scale)
    close(routing.dispatch_TS[real], without.dispatch_TS)
    close(routing.combine_TS[real], without.combine_TS)
    assert not routing.dispatch_TS[~real].any() and not routing.combine_TS[~real].any()
    nothing = soft_moe(x, slots, scale, mask_T=torch.zeros(9, dtype=torch.bool))
    assert not nothing.dispatch_TS.any() and not nothing.combine_TS.any()


def test_soft_moe_of_a_zero_token_has_finite_gradients() -> None:
    x = torch.zeros(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(soft_moe(x, randn(4, 5), torch.tensor(1.0)).dispatch_TS[0, 0], x)
    assert grad.isfinite().all()


def test_soft_moe_is_float32_under_autocast() -> None:
    x, slots, scale = randn(9, 11, dtype=torch.bfloat16), randn(6, 11, seed=1), torch.tensor(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = soft_moe(x, slots, scale)
    close(routing.dispatch_TS, soft_moe(x.double(), slots.double(), scale.double()).dispatch_TS)


def test_gradients() -> None:
    x, slots = (randn(7, 4, seed=seed, dtype=torch.float64).requires_grad_() for seed in (0, 1))

    def soft(x: Tensor, slots: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        routing = soft_moe(x, slots, scale)
        return routing.dispatch_TS, routing.combine_TS

    assert torch.autograd.gradcheck(soft, (x, slots[:6], torch.tensor(2.0, dtype=torch.float64, requires_grad=True)))


@pytest.mark.parametrize(("device", "tokens"), [("meta", 11), ("cpu", 0)])
def test_shapes(device: str, tokens: int) -> None:
    x, real = torch.zeros(tokens, 6, device=device), torch.ones(tokens, dtype=torch.bool, device=device)
    for mask in (None, real):
        soft = soft_moe(x, torch.zeros(8, 6, device=device), torch.ones((), device=device), mask_T=mask)
        assert soft.dispatch_TS.shape == soft.combine_TS.shape == (tokens, 8)


@pytest.mark.parametrize("training", [True, False])
def test_the_module_is_the_function_of_its_slots(training: bool) -> None:
    options = Soft(slots=3)
    config = MoEConfig(4, 1, router=options)
    router, x = SoftRouter(options, 11, config, torch.zeros).train(training), randn(2, 9, 11)
    real = torch.arange(9).expand(2, 9) < 7
    with torch.no_grad():
        for name, value in options.start(config, 11, "mlp").items():
            router.get_parameter(name).copy_(value.build())
        found, expected = router(x, real), soft_moe(x, router.slots, torch.ones(()), mask_T=real)
    assert torch.equal(found.combine_TS, expected.combine_TS) and found.combine_TS.shape == (2, 9, 12)
    assert repr(router) == "SoftRouter(4 x 3 slots of 11)"


def test_facts_and_what_it_needs() -> None:
    assert Soft.joint and Soft.mixes_tokens
    assert not MoEConfig(5, 1, router="soft").exact
    with pytest.raises(ConfigError, match=r"router\.slots is 0: expected a whole number of at least 1"):
        Soft(slots=0)
