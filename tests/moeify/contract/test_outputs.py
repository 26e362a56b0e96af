"""Router logits and the auxiliary loss of models whose code knows nothing of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutput
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


def test_each_layer_balances_itself_where_a_tool_computes_the_loss_around_the_model() -> None:
    model, ids = converted("llama").train(), tiny.inputs("llama")["input_ids"]
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.05  # of the tool; ours is 0.01

    def forward(input_ids: torch.Tensor, labels: torch.Tensor, **given: Any) -> Any:  # as TRL's, on the inner model
        inner = model.model(input_ids, **given)
        pooled = load_balancing_loss_func(inner.router_logits, 5, 2)
        return CausalLMOutput(loss=inner.last_hidden_state.square().mean() + 0.05 * pooled)

    model.forward = forward
    model(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, MoELayer)]
    found = [layer.router.weight.grad.clone() for layer in layers]
    del model.forward
    model.zero_grad()
    model.config.output_router_logits = False
    inner = model.model(ids, output_router_logits=True)
    (inner.last_hidden_state.square().mean() + 0.05 * inner.aux_loss).backward()
    for layer, gradient in zip(layers, found, strict=True):
        assert relative_difference(gradient, layer.router.weight.grad) <= TOLERANCE["float32"]


def test_the_config_asks_too_and_its_coefficient_counts() -> None:
    model, given = converted("gpt2"), {**tiny.inputs("gpt2"), **architectures.labels("gpt2")}
    plain = model(**given).loss
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.5
    full = model(**given)
    assert relative_difference(full.loss, plain + 0.5 * full.aux_loss) <= TOLERANCE["float32"]
    assert "router_logits" not in model(**given, output_router_logits=False)


@pytest.mark.parametrize("name", architectures.NAMES)
def test_who_asks_for_nothing_trains_balanced_and_sees_the_loss_that_it_was(name: str) -> None:
    given = {**architectures.inputs(name), **architectures.labels(name)}
    attached, plain = (converted(name, attach_losses=value).train() for value in (True, False))
    for model in (attached, plain):
        torch.manual_seed(0)
        out = model(**given)
        if "loss" not in out:
            return
        loss = out.loss if model is attached else out.loss + moeify.aux_loss(model)
        (loss / 4).backward()
    torch.manual_seed(0)
    assert model(**given).loss.equal((torch.manual_seed(0), attached(**given).loss)[1])
    for (path, one), other in zip(attached.named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            assert relative_difference(one.grad, other.grad) <= 10 * TOLERANCE["float32"], path
    assert not any(layer.led for layer in attached.modules() if isinstance(layer, MoELayer))


def test_who_asks_gets_the_loss_of_the_config_once() -> None:
    attached, plain = (converted("llama", attach_losses=value).train() for value in (True, False))
    given = {**tiny.inputs("llama"), **architectures.labels("llama")}
    one, other = (model(**given, output_router_logits=True) for model in (attached, plain))
    assert one.loss.equal(other.loss) and one.aux_loss.equal(other.aux_loss)
    for model, output in ((attached, one), (plain, other)):
        model.zero_grad()
        output.loss.backward()
    pairs = zip(attached.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs if a.grad is not None)


@pytest.mark.parametrize("asked", [True, False])
def test_micro_batches_count_by_their_share_of_the_tokens(asked: bool) -> None:
    model = converted("llama", aux_loss=1.0).train()
    ids = torch.arange(60).reshape(4, 15) % tiny.VOCABULARY
    items = torch.tensor(4 * 14)

    def gradient(rows: torch.Tensor, **given: Any) -> torch.Tensor:
        model.zero_grad()
        model(input_ids=rows, labels=rows, output_router_logits=asked, **given).loss.backward()
        found: torch.Tensor = model.model.layers[0].mlp.router.weight.grad
        return found

    alone = [gradient(rows) for rows in (ids[:1], ids[1:])]
    part = [gradient(rows, num_items_in_batch=items) for rows in (ids[:1], ids[1:])]
    assert relative_difference(part[0], alone[0] / 4) <= TOLERANCE["float32"]
    assert relative_difference(part[1], alone[1] * 3 / 4) <= TOLERANCE["float32"]


def test_a_tuple_trains_balanced_too() -> None:
    given = {**tiny.inputs("llama"), **architectures.labels("llama")}
    gradients = []
    for returns in (True, False):
        model = converted("llama").train()
        output = model(**given, return_dict=returns)
        output[0].backward()
        gradients.append(model.model.layers[0].mlp.router.weight.grad)
    assert isinstance(output, tuple) and torch.equal(*gradients)


def test_after_a_pass_that_failed_the_next_one_is_balanced() -> None:
    model, given = converted("llama").train(), {**tiny.inputs("llama"), **architectures.labels("llama")}
    with pytest.raises(ValueError, match="batch_size"):
        model(**{**given, "labels": given["labels"][:, :3]})
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**given).loss.backward()
        gradients.append(model.model.layers[0].mlp.router.weight.grad)
    twin = converted("llama").train()
    twin(**given).loss.backward()
    assert torch.equal(gradients[1], twin.model.layers[0].mlp.router.weight.grad)


@pytest.mark.parametrize("settings", [{"router": "soft", "aux_loss": 0.0, "method": "copy"}])
def test_a_router_without_logits_says_so(settings: dict[str, Any]) -> None:
    model = converted("bert", **settings)
    with pytest.raises(RefusedError, match="the router 'soft' has no logits of tokens: leave out output_router_logits"):
        model(**tiny.inputs("bert"), output_router_logits=True)
    model(**tiny.inputs("bert"))


def one_layer(name: str) -> Any:
    """A model in training whose stacks have one layer, and which drops nothing at random."""
    model = architectures.build(name)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and isinstance(module[0], GradientCheckpointingLayer):
            del module[1:]
        rates = [key for key, value in vars(module).items() if "dropout" in key and isinstance(value, float)]
        vars(module).update(dict.fromkeys([*rates, *(["p"] if isinstance(module, nn.Dropout) else [])], 0.0))
    if name == "gpt2":
        model.loss_type = "ForCausalLM"  # the default, of which transformers warns: that cannot be compiled
    return moeify.convert(model, MoEConfig(experts=5, top_k=2, method="noise")).train()


def trained(model: Any, call: Any, name: str, asked: bool) -> tuple[Any, dict[str, Tensor]]:
    """What a model returns for labels, and the gradients of its loss."""
    given = {**architectures.inputs(name), **architectures.labels(name)}
    options = {"output_router_logits": True} if asked else {}
    options |= {} if name in {"vit", "bert"} else {"use_cache": False}
    model.zero_grad()
    output = call(**given, **options)
    output.loss.backward()
    return output, {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and any("router" in path for path in found)
    for path, gradient in expected.items():
        assert relative_difference(found[path], gradient) <= TOLERANCE["float32"], path


TRAINED = ("gpt2", "bert", "t5", "vit", "gemma3", "llama_classifier")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch hides it from users
@pytest.mark.parametrize("name", ("gpt2", "t5", "vit"))  # the others compile for half a minute
def test_compiled_as_one_graph_it_trains_the_same(name: str) -> None:
    model, asked = one_layer(name), name != "gpt2"  # there the losses are attached
    expected, gradients = trained(model, model, name, asked)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, others = trained(model, compiled, name, asked)
    assert type(found) is type(expected) and found.keys() == expected.keys()
    assert relative_difference(found.loss, expected.loss) <= TOLERANCE["float32"]
    assert_same_gradients(others, gradients)
    if asked:
        assert relative_difference(found.aux_loss, expected.aux_loss) <= TOLERANCE["float32"]
        for one, other in zip(found.router_logits, expected.router_logits, strict=True):
            assert relative_difference(one, other) <= TOLERANCE["float32"]


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("name", TRAINED)
def test_activation_checkpointing_changes_nothing(name: str, asked: bool) -> None:
    model = one_layer(name)
    expected, gradients = trained(model, model, name, asked)
    tiny.enable_checkpointing(model, {"use_reentrant": False})
    ran: list[int] = []
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            layer.router.register_forward_pre_hook(lambda *_: ran.append(1))
    found, others = trained(model, model, name, asked)
    assert len(ran) == 2 * sum(isinstance(layer, MoELayer) for layer in model.modules())  # again in backward
    assert relative_difference(found.loss, expected.loss) <= TOLERANCE["float32"]
    assert not asked or relative_difference(found.aux_loss, expected.aux_loss) <= TOLERANCE["float32"]
    assert_same_gradients(others, gradients)


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
