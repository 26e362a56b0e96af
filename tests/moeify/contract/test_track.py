"""Hooks on the layers of transformers' models see what the routers do, and go away again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import moeify
from moeify.contract.found import find_layers
from moeify.contract.track import track
from tests.moeify import native, tiny


@pytest.mark.parametrize("name", native.MODELS)
@torch.no_grad()
def test_logits_and_choices_are_those_of_the_router(name: str) -> None:
    model = native.build(name)
    expected = model(**native.inputs(name)).logits
    heard = native.Heard(model, name)
    track(model)
    assert torch.equal(model(**native.inputs(name)).logits, expected)  # looking changes nothing
    for path, layer in find_layers(model).items():
        record = layer.record
        assert record is not None
        logits = heard.logits[path]
        choices = heard.choices[path] or [set(row.topk(native.TOP_K).indices.tolist()) for row in logits]
        assert torch.equal(record.routing.logits_TE, logits)
        assert [set(row) for row in record.routing.expert_ids_TK.tolist()] == choices
        assert len(choices) in {22, 10} and record.sequences == 2 and record.mask_T is None
        torch.testing.assert_close(record.routing.scores_TE.sum(-1), torch.ones(len(choices)))


@pytest.mark.parametrize(
    ("name", "score"),
    [("mixtral", "softmax"), ("gpt_oss", "softmax"), ("deepseek_v3", "sigmoid"), ("glm4_moe", "sigmoid"),
     ("llama4", "sigmoid"), ("phimoe", "softmax"), ("jamba", "softmax"), ("switch", "softmax")],
)  # fmt: skip
@torch.no_grad()
def test_scores_are_those_of_the_paper(name: str, score: str) -> None:
    model = native.build(name)
    track(model)
    model(**native.inputs(name))
    for layer in find_layers(model).values():
        assert layer.record is not None
        routing = layer.record.routing
        scores = routing.logits_TE.sigmoid() if score == "sigmoid" else routing.logits_TE.softmax(-1)
        torch.testing.assert_close(routing.scores_TE, scores / scores.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "llama4", "switch"])
def test_padding_is_known(name: str) -> None:
    model, given = native.build(name), native.inputs(name)
    mask = torch.ones_like(given["input_ids"])
    mask[1, 7:] = 0
    track(model)
    model(**given, attention_mask=mask)
    layer = next(iter(find_layers(model).values()))
    assert layer.record is not None and layer.record.mask_T is not None
    assert torch.equal(layer.record.mask_T, mask.flatten() != 0)


def hooks(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield from (*module._forward_hooks.values(), *module._forward_pre_hooks.values())


def test_the_hooks_are_there_once_and_go_away() -> None:
    model = native.build("mixtral")
    before = list(hooks(model))
    tracking = track(model)
    added = len(list(hooks(model)))
    track(model)
    assert len(list(hooks(model))) == added > len(before)
    model(**native.inputs("mixtral"))
    tracking.remove()
    assert list(hooks(model)) == before
    assert all(layer.state is None for layer in find_layers(model).values())


def test_layers_of_moeify_need_no_hooks() -> None:
    model = moeify.convert(tiny.build("llama"), moeify.MoEConfig(4, 2))
    before = list(hooks(model))
    track(model)
    assert list(hooks(model)) == before


def test_a_tracked_model_can_be_copied_and_pickled() -> None:
    model = native.build("mixtral").train()
    track(model)
    model(**native.inputs("mixtral"))  # what is kept hangs on a graph
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        layers = find_layers(twin).values()
        assert all(layer.state is not None and layer.record is None for layer in layers)
        twin(**native.inputs("mixtral"))
        assert all(layer.record is not None for layer in layers)
    mine = [layer.state for layer in find_layers(model).values()]
    assert all(layer.state not in mine for layer in find_layers(twin).values())
