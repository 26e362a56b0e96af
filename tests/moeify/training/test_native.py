"""The tools of training on MoEs of transformers' own, against loops over what their routers compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import moeify
from moeify.contract.found import find_layers
from moeify.errors import ConfigError, MoeifyError, RefusedError
from tests.moeify import native

BALANCED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "granitemoeshared", "ernie4_5_moe",
            "phimoe", "jamba")  # fmt: skip  # they use transformers' loss
REST = ("deepseek_v2", "deepseek_v3", "glm4_moe", "llama4", "dbrx", "jetmoe", "switch", "nllb")


def router_logits(model: Any, name: str, **given: Any) -> dict[str, Tensor]:
    """The logits of a forward pass, from hooks that are gone after it."""
    heard = native.Heard(model, name)
    model(**native.inputs(name), **given)
    heard.remove()
    return heard.logits


def test_every_model_is_in_a_list() -> None:
    assert sorted((*BALANCED, *REST)) == sorted(native.MODELS)


@pytest.mark.parametrize("name", native.MODELS)
@torch.no_grad()
def test_routing_stats_count_what_the_logits_choose(name: str) -> None:
    model = native.build(name)
    moeify.track_routing(model)
    logits = router_logits(model, name)
    stats = moeify.routing_stats(model)
    assert list(stats) == list(find_layers(model)) and set(stats) == set(logits)
    top_k, grouped = 1 if name == "switch" else 2, name in {"deepseek_v3", "glm4_moe"}
    for path, layer in stats.items():
        counts = [0] * native.EXPERTS
        for row in logits[path]:
            if grouped:  # the better half by its two best experts
                halves = row.sigmoid().view(2, -1)
                best = int(halves.topk(2).values.sum(-1).argmax())
                row = torch.full_like(row, -torch.inf).index_copy(0, i := torch.arange(3) + 3 * best, row[i])
            for expert in row.topk(top_k).indices.tolist():
                counts[expert] += 1
        tokens = len(logits[path])
        assert (layer.tokens, layer.choices, layer.dropped) == (tokens, tokens * top_k, 0)
        assert layer.load == pytest.approx([count / sum(counts) for count in counts])
        if name not in {"deepseek_v3", "glm4_moe", "llama4"}:  # they take sigmoids
            probabilities = logits[path].softmax(-1)
            assert layer.entropy == pytest.approx(
                float(-(probabilities * probabilities.log()).sum(-1).mean()), rel=1e-4
            )
            share = torch.tensor(counts) / tokens
            balance = native.EXPERTS * float((share * probabilities.mean(0)).sum())
            assert layer.losses == {"balance": pytest.approx(balance, rel=1e-4)}


@pytest.mark.parametrize("name", BALANCED)
def test_aux_loss_is_that_of_transformers(name: str) -> None:
    model, given = native.build(name).train(), native.inputs(name)
    for module in model.modules():  # noise would differ between two passes
        for noise in ("router_jitter_noise", "input_jitter_noise", "jitter_noise"):
            if hasattr(module, noise):
                setattr(module, noise, 0.0)
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.3
    mask = torch.ones_like(given["input_ids"])
    mask[1, 8:] = 0
    moeify.track_routing(model)
    if name == "phimoe":
        model.eval()  # it chooses at random in training
    logits = router_logits(model, name, attention_mask=mask)
    loss = moeify.aux_loss(model)
    every: Any = tuple(logits.values())
    expected: Any = load_balancing_loss_func(every, native.EXPERTS, native.TOP_K, mask)
    torch.testing.assert_close(loss, 0.3 * expected)
    routers = [p for layer in find_layers(model).values() for p in layer.part("routers") if p.requires_grad]
    found = torch.autograd.grad(loss, routers, allow_unused=True)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in found)


@pytest.mark.parametrize("name", REST)
def test_aux_loss_of_the_others(name: str) -> None:
    model = native.build(name)
    moeify.track_routing(model)
    logits = router_logits(model, name)
    if not hasattr(model.config, "router_aux_loss_coef"):
        with pytest.raises(
            ConfigError, match=r"no router_aux_loss_coef.*set model.config.router_aux_loss_coef = 0.001"
        ):
            moeify.aux_loss(model)
    model.config.router_aux_loss_coef, model.config.router_z_loss_coef = 0.3, 0.05
    stacks: dict[str, list[Tensor]] = {}
    for path, layer in find_layers(model).items():
        assert layer.record is not None and layer.state is not None
        ids, scores = layer.record.routing.expert_ids_TK, layer.record.routing.scores_TE
        counts = torch.zeros(native.EXPERTS)
        for expert in ids.flatten().tolist():
            counts[expert] += 1
        tokens = torch.full((native.EXPERTS,), len(ids))
        z = logits[path].logsumexp(-1).square().sum()
        side = "decoder" if "decoder" in path else "self_attention" if "attention" in path else ""
        stacks.setdefault(side, []).append(torch.stack([counts, scores.sum(0), tokens, z.expand(native.EXPERTS)]))
    if name == "jetmoe":  # its two kinds of layers are one stack
        stacks = {"": [*stacks[""], *stacks["self_attention"]]}
    expected = torch.zeros(())
    for rows in stacks.values():
        counts, mass, count, z = torch.stack(rows).sum(0)
        expected += 0.3 * native.EXPERTS * (counts / count * mass / count).sum() + 0.05 * (z / count)[0]
    torch.testing.assert_close(moeify.aux_loss(model), expected)


def test_a_first_call_without_a_record_says_what_to_do() -> None:
    model = native.build("mixtral")
    model(**native.inputs("mixtral"))
    with pytest.raises(MoeifyError, match=r"nobody looked when model.layers.0.mlp ran.*call the model again"):
        moeify.routing_stats(model)
    with pytest.raises(MoeifyError, match="no MoE layer has run yet: call the model before aux_loss"):
        moeify.aux_loss(model)
    model(**native.inputs("mixtral"))
    assert len(moeify.routing_stats(model)) == 3 and moeify.aux_loss(model) > 0


def test_a_loss_that_the_model_adds_itself_is_not_given_twice() -> None:
    model = native.build("mixtral")
    moeify.track_routing(model)
    model.config.output_router_logits = True
    model(**native.inputs("mixtral"))
    with pytest.raises(ConfigError, match=r"MixtralForCausalLM adds the balancing loss itself .*leave out aux_loss"):
        moeify.aux_loss(model)
    with torch.no_grad():
        assert moeify.aux_loss(model) > 0  # to log
    model.config.router_aux_loss_coef = 0.0
    assert moeify.aux_loss(model) == 0


def test_training_without_gradients_in_a_layer_is_told() -> None:
    model = native.build("mixtral").train()
    moeify.track_routing(model)
    with torch.no_grad():
        model(**native.inputs("mixtral"))
    with pytest.raises(MoeifyError, match=r"model.layers.0.mlp ran without gradients"):
        moeify.aux_loss(model)


@pytest.mark.parametrize("name", native.MODELS)
def test_freeze_and_groups(name: str) -> None:
    model = native.build(name)
    moeify.freeze(model, "non_moe")
    layers = find_layers(model).values()
    inside = {id(p) for layer in layers for part in ("routers", "experts") for p in layer.part(part)}
    selection_bias = {id(p) for path, p in model.named_parameters() if "moe_statics" in path}  # never trained
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == inside - selection_bias and trained
    model.requires_grad_(True)
    moeify.freeze(model, "experts")
    routed = {id(p) for layer in layers for experts in layer.experts for p in experts.parameters()}
    assert not any(p.requires_grad for p in model.parameters() if id(p) in routed)
    groups = moeify.param_groups(model, routers={"lr": 0.5})
    assert [group["name"] for group in groups] == ["routers", "rest"] and groups[0]["lr"] == 0.5
    assert {id(p) for p in groups[0]["params"]} == {
        id(p) for layer in layers for p in layer.part("routers") if p.requires_grad
    }


@pytest.mark.parametrize("name", native.MODELS)
@torch.no_grad()
def test_capacity_or_why_not(name: str) -> None:
    model = native.build(name)
    if name in {"llama4", "jetmoe", "switch", "nllb"}:
        with pytest.raises(RefusedError, match=r"is not told who chose what|keeps a capacity of its own"):
            moeify.set_capacity(model, 0.5)
        return
    free = model(**native.inputs(name)).logits
    moeify.set_capacity(model, 0.5)
    limited = model(**native.inputs(name)).logits
    assert not torch.equal(limited, free)
    assert sum(stats.dropped for stats in moeify.routing_stats(model).values()) > 0
    moeify.set_capacity(model, None)
    assert torch.equal(model(**native.inputs(name)).logits, free)
    with pytest.raises(ConfigError, match="the capacity factor is -1"):
        moeify.set_capacity(model, -1)


def test_dropout_in_stock_experts_is_refused() -> None:
    from moeify.training.recipes import FineTuning

    with pytest.raises(RefusedError, match=r"the experts of model.layers.0.mlp have no dropout"):
        FineTuning.switch().prepare(native.build("mixtral"))
    FineTuning.frozen_experts().prepare(native.build("mixtral"))
