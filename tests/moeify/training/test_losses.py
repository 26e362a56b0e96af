from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeify
from moeify.config import MoEConfig
from moeify.errors import MoeifyError
from moeify.layers import SparseMoE
from tests.moeify import tiny

IDS = torch.arange(60).reshape(4, 15) % tiny.VOCABULARY
CONFIG = MoEConfig(5, 2, aux_loss=0.3, z_loss=0.02, attach_losses=False)
ATTACHED = replace(CONFIG, attach_losses=True)


def model_with(config: MoEConfig) -> Any:
    return moeify.convert(tiny.build("llama"), config).train()


def own_loss(model: Any, ids: Tensor = IDS) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(loss)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name)


def test_the_sum_over_layers_with_coefficients() -> None:
    model = model_with(CONFIG)
    own_loss(model)
    expected = sum(
        0.3 * layer.losses()["balance"] + 0.02 * layer.losses()["z"]
        for layer in model.modules()
        if isinstance(layer, SparseMoE)
    )
    torch.testing.assert_close(moeify.aux_loss(model), expected)


def test_it_follows_the_last_forward_pass() -> None:
    model = model_with(CONFIG)
    values = []
    for ids in (IDS, IDS[:1], IDS):
        own_loss(model, ids)
        values.append(moeify.aux_loss(model).item())
    assert values[0] == values[2] != values[1]


def test_an_untouched_script_with_attached_losses_gets_the_gradients_of_one_that_adds_them() -> None:
    added = model_with(CONFIG)
    loss = own_loss(added)
    expected = gradients(added, loss + moeify.aux_loss(added))
    attached = model_with(ATTACHED)
    assert own_loss(attached).equal(loss)  # the value stays what a script logs
    assert_same(gradients(attached, own_loss(attached)), expected)
    value = moeify.aux_loss(attached)
    assert value > 0 and not value.requires_grad  # adding it too does no harm


def test_activation_checkpointing_of_the_model_changes_nothing() -> None:
    model = model_with(CONFIG)
    expected = gradients(model, own_loss(model) + moeify.aux_loss(model))
    tiny.enable_checkpointing(model, {"use_reentrant": False})
    assert_same(gradients(model, own_loss(model) + moeify.aux_loss(model)), expected)


def test_reentrant_checkpointing_loses_the_gradient_and_says_so() -> None:
    model = model_with(CONFIG)
    tiny.enable_checkpointing(model, {"use_reentrant": True})
    model.enable_input_require_grads()
    own_loss(model)
    with pytest.raises(MoeifyError, match=r"model.layers.0.mlp ran without gradients.*use_reentrant=False"):
        moeify.aux_loss(model)
    with torch.no_grad():
        assert moeify.aux_loss(model) > 0  # a value to log needs none


def without_labels(model: Any, ids: Tensor) -> Tensor:
    """The loss of a script that computes its own."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("own", [own_loss, without_labels])
def test_accumulated_micro_batches_with_attached_losses(own: Callable[[Any, Tensor], Tensor]) -> None:
    added = model_with(CONFIG)
    expected: dict[str, Tensor] = {}
    for half in (IDS[:2], IDS[2:]):
        for name, gradient in gradients(added, (own(added, half) + moeify.aux_loss(added)) / 2).items():
            expected[name] = expected.get(name, torch.zeros(())) + gradient
    attached = model_with(ATTACHED)
    moeify.scale_attached_losses(attached, 1 / 2)  # the model's own loss, which is scaled anyway, does not look at it
    for half in (IDS[:2], IDS[2:]):
        torch.autograd.backward(own(attached, half) / 2)
    assert_same({name: p.grad for name, p in attached.named_parameters() if p.grad is not None}, expected)


@pytest.mark.parametrize("own", [own_loss, without_labels])
def test_a_gradient_scaler_in_mixed_precision(own: Callable[[Any, Tensor], Tensor]) -> None:
    model = model_with(ATTACHED)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, own(model, IDS))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    moeify.scale_attached_losses(model, scaler.get_scale())
    with torch.autocast("cpu", torch.bfloat16):
        scaled = gradients(model, scaler.scale(own(model, IDS)))
    assert_same({name: g / 1024 for name, g in scaled.items()}, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch hides it from users
def test_a_compiled_model_trains_the_same() -> None:
    model = model_with(CONFIG)
    expected = gradients(model, own_loss(model) + moeify.aux_loss(model))
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(gradients(model, own_loss(compiled) + moeify.aux_loss(compiled)), expected)


def test_no_loss_no_layer_no_forward() -> None:
    assert moeify.aux_loss(model_with(MoEConfig(5, 2, aux_loss=0.0))) == 0
    for config in (CONFIG, MoEConfig(5, 2, aux_loss=0.0, z_loss=0.1), MoEConfig(5, 2, aux_loss=0.1)):
        with pytest.raises(MoeifyError, match="no MoE layer has run yet"):
            moeify.aux_loss(model_with(config))
    with pytest.raises(MoeifyError, match="Linear has no MoE layer"):
        moeify.aux_loss(nn.Linear(2, 2))


def test_the_mean_over_layers() -> None:
    summed, divided = (model_with(replace(CONFIG, divide_loss_by_layers=divide)) for divide in (False, True))
    for model in (summed, divided):
        own_loss(model)
    layers = sum(isinstance(module, SparseMoE) for module in divided.modules())
    assert layers > 1
    torch.testing.assert_close(moeify.aux_loss(divided), moeify.aux_loss(summed) / layers)


def test_experts_that_nothing_balances_are_told_of_once() -> None:
    model = model_with(CONFIG)
    with pytest.warns(UserWarning, match="nothing balances them: add moeify.aux_loss") as told:
        for _ in range(2):
            torch.autograd.backward(own_loss(model))
    assert len({str(each.message) for each in told}) == 1


@pytest.mark.parametrize("script", ["adds", "attached", "of its own", "frozen", "no gradients", "without balance"])
@pytest.mark.filterwarnings("error")
def test_nobody_is_told_without_need(script: str) -> None:
    settings = {"attached": ATTACHED, "of its own": ATTACHED, "without balance": replace(CONFIG, aux_loss=0.0)}
    model = model_with(settings.get(script, CONFIG))
    if script == "frozen":
        moeify.freeze(model, "moe")
    for _ in range(3):
        with torch.set_grad_enabled(script != "no gradients"):
            loss = without_labels(model, IDS) if script == "of its own" else own_loss(model)
            loss = loss + moeify.aux_loss(model) if script == "adds" else loss
        if loss.requires_grad:
            torch.autograd.backward(loss)
            model.zero_grad()


def test_a_loss_that_the_script_leaves_aside_balances_nothing() -> None:
    model = model_with(ATTACHED)
    with pytest.warns(UserWarning, match="nothing balances them"):
        for _ in range(2):
            torch.autograd.backward(model(input_ids=IDS, labels=IDS).logits.square().mean())
