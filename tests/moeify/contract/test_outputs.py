"""Router logits and the auxiliary loss of models whose code knows nothing of experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import moeify
from moeify.config import MoEConfig
from moeify.errors import RefusedError
from moeify.layers import MoELayer
from moeify.measure import TOLERANCE, relative_difference
from tests.moeify import tiny
from tests.moeify.contract import architectures


def converted(name: str, **settings: Any) -> Any:
    config = MoEConfig(experts=5, top_k=2, **{"method": "noise", **settings})
    return moeify.convert(architectures.build(name), config)


@pytest.mark.parametrize("name", architectures.NAMES)
def test_outputs_hold_router_logits_and_the_loss_includes_the_auxiliary_one(name: str) -> None:
    model = converted(name)
    given = {**architectures.inputs(name), **architectures.labels(name)}
    plain = model(**given)
    assert "router_logits" not in plain and "aux_loss" not in plain
    full = model(**given, output_router_logits=True)
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, MoELayer)]
    assert isinstance(full, type(plain)) and len(full.router_logits) == len(layers)
    for logits, layer in zip(full.router_logits, layers, strict=True):
        assert torch.equal(logits, layer.record.routing.logits_TE)
    each = [layer.losses()["balance"] for layer in layers]
    assert relative_difference(full.aux_loss, sum(each)) <= TOLERANCE["float32"]
    if "loss" in plain:
        expected = plain.loss + 0.01 * sum(each)
        assert relative_difference(full.loss, expected) <= TOLERANCE["float32"]
        model.zero_grad()
        full.loss.backward()
        assert all(layer.router.weight.grad.abs().sum() > 0 for layer in layers)


def test_the_loss_of_a_layer_is_that_of_transformers() -> None:
    model, given = converted("llama"), tiny.inputs("llama")
    full = model(**given, output_router_logits=True)
    theirs: list[Any] = [load_balancing_loss_func((logits,), 5, 2) for logits in full.router_logits]
    assert relative_difference(full.aux_loss, sum(theirs, torch.zeros(()))) <= TOLERANCE["float32"]


def test_the_config_asks_too_and_its_coefficient_counts() -> None:
    model, given = converted("gpt2"), {**tiny.inputs("gpt2"), **architectures.labels("gpt2")}
    plain = model(**given).loss
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.5
    full = model(**given)
    assert relative_difference(full.loss, plain + 0.5 * full.aux_loss) <= TOLERANCE["float32"]
    assert "router_logits" not in model(**given, output_router_logits=False)


def test_attached_losses_are_shown_and_not_added_twice() -> None:
    attached, plain = (converted("llama", attach_losses=value).train() for value in (True, False))
    given = {**tiny.inputs("llama"), **architectures.labels("llama")}
    one, other = (model(**given, output_router_logits=True) for model in (attached, plain))
    assert relative_difference(one.aux_loss, other.aux_loss) <= TOLERANCE["float32"]
    assert relative_difference(one.loss, attached(**given).loss) <= TOLERANCE["float32"]
    for model, output in ((attached, one), (plain, other)):
        model.zero_grad()
        output.loss.backward()
    pairs = zip(attached.parameters(), plain.parameters(), strict=True)
    assert all(relative_difference(a.grad, b.grad) <= TOLERANCE["float32"] for a, b in pairs if a.grad is not None)


@pytest.mark.parametrize("settings", [{"router": "soft", "aux_loss": 0.0, "method": "copy"}])
def test_a_router_without_logits_says_so(settings: dict[str, Any]) -> None:
    model = converted("bert", **settings)
    with pytest.raises(RefusedError, match="the router 'soft' has no logits of tokens: leave out output_router_logits"):
        model(**tiny.inputs("bert"), output_router_logits=True)
    model(**tiny.inputs("bert"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch hides it from users
def test_compiled_as_one_graph_it_returns_the_same() -> None:
    model = converted("llama").train()
    given = {**tiny.inputs("llama"), **architectures.labels("llama"), "use_cache": False}
    expected = model(**given, output_router_logits=True)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(**given, output_router_logits=True)
    assert relative_difference(found.loss, expected.loss) <= TOLERANCE["float32"]
    assert relative_difference(found.aux_loss, expected.aux_loss) <= TOLERANCE["float32"]


def test_activation_checkpointing_changes_nothing() -> None:
    model = converted("llama").train()
    given = {**tiny.inputs("llama"), **architectures.labels("llama")}
    twin = copy.deepcopy(model)
    tiny.enable_checkpointing(twin, {"use_reentrant": False})
    for each in (model, twin):
        each(**given, output_router_logits=True).loss.backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(relative_difference(b.grad, a.grad) <= TOLERANCE["float32"] for a, b in pairs if a.grad is not None)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_accumulated_batches_share_the_added_loss_by_their_tokens(name: str) -> None:
    model = converted(name)
    batches = []
    for rows in ([0], [1, 2]):
        given = {**architectures.inputs(name), **architectures.labels(name)}
        batch = {key: value[rows] for key, value in given.items()}
        batch["labels"][:, : 3 - len(rows)] = -100
        batches.append(batch)
    counted = [(batch["labels"][:, 1:] if name == "llama" else batch["labels"]).ne(-100).sum() for batch in batches]
    items = sum(counted, torch.tensor(0))
    for batch, count in zip(batches, counted, strict=True):
        plain = model(**batch, num_items_in_batch=items) if name == "llama" else model(**batch)
        full = model(**batch, num_items_in_batch=items, output_router_logits=True)
        assert relative_difference(full.loss, plain.loss + 0.01 * count / items * full.aux_loss) <= TOLERANCE["float32"]
