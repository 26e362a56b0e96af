from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import moeify
from moeify.config import MoEConfig
from moeify.layers import SparseMoE
from moeify.layers.model_inputs import ModelInputs
from tests.moeify import tiny

IDS = torch.arange(40).reshape(4, 10) % tiny.VOCABULARY
MASK = torch.ones(4, 10, dtype=torch.int64)
MASK[2, 6:] = 0


def converted(name: str, config: MoEConfig) -> tuple[Any, list[SparseMoE]]:
    model: Any = moeify.convert(tiny.build(name), config)
    return model, [layer for layer in model.modules() if isinstance(layer, SparseMoE)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_layers_hear_of_the_mask_of_this_call(name: str) -> None:
    model, layers = converted(name, MoEConfig(5, 2))
    model(input_ids=IDS, attention_mask=MASK)
    for layer in layers:
        assert layer.record is not None and layer.record.mask_T is not None
        assert layer.record.mask_T.equal(MASK.flatten().bool())
    model(input_ids=IDS)
    assert all(layer.record is not None and layer.record.mask_T is None for layer in layers)
    # A wrapper that calls `forward` passes the hooks of the model by, not those of the module inside.
    model.forward(input_ids=IDS, attention_mask=MASK)
    assert all(layer.record is not None and layer.record.mask_T is not None for layer in layers)


def test_encoder_and_decoder_hear_of_their_own_masks() -> None:
    model, layers = converted("t5", MoEConfig(5, 2))
    model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS[:, :3])
    masks = [layer.record.mask_T for layer in layers if layer.record is not None]
    assert [mask is None for mask in masks] == [False, False, True]


def test_a_copy_hears_of_its_own_mask() -> None:
    model, layers = converted("llama", MoEConfig(5, 2))
    other = copy.deepcopy(model)
    other(input_ids=IDS, attention_mask=MASK)
    assert all(layer.model_inputs.mask is None for layer in layers)
    found = [layer for layer in other.modules() if isinstance(layer, SparseMoE)]
    assert all(layer.record is not None and layer.record.mask_T is not None for layer in found)


def test_hash_routing_in_a_model_follows_the_token_ids_with_a_cache_too() -> None:
    config = MoEConfig(5, 1, router=moeify.routers.Hash(vocab_size=tiny.VOCABULARY))
    model, layers = converted("llama", config)
    dense: Any = tiny.build("llama")
    prompt = {"input_ids": IDS[:1, :4], "max_new_tokens": 5, "do_sample": False}
    assert model.generate(**prompt).equal(dense.generate(**prompt))
    router: Any = layers[0].router
    model(input_ids=IDS)
    record = layers[0].record
    assert record is not None
    assert record.routing.expert_ids_TK[:, 0].equal(router.table[IDS.flatten()])
    assert router.table.bincount(minlength=5).tolist() == [21, 20, 20, 20, 20]


def test_the_last_columns_of_the_mask_are_those_of_the_tokens_after_a_cache() -> None:
    inputs = ModelInputs()
    inputs.token_ids, inputs.mask = IDS[:2, :1], torch.tensor([[0, 0, 1], [1, 1, 1]])  # left padding
    mask, _ = inputs.tokens(torch.zeros(2, 1, 8))
    assert mask is not None and mask.tolist() == [True, True]


def test_a_router_that_reads_the_mask_decodes_left_padding_with_a_cache_as_without() -> None:
    config = MoEConfig.expert_choice(5, 2, capacity_factor=2.5)  # every expert takes every real token
    model, layers = converted("llama", config)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :3] = 0
    prompt = {"input_ids": IDS[:2, :6], "attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    cached, whole = (
        model.generate(**prompt, use_cache=use_cache, return_dict_in_generate=True, output_logits=True).logits
        for use_cache in (True, False)
    )
    for with_cache, without in zip(cached, whole, strict=True):
        torch.testing.assert_close(with_cache, without)
    assert all(layer.record is not None and layer.record.mask_T is not None for layer in layers)


def test_a_tower_of_another_length_is_told_nothing_and_an_export_leaves_nothing() -> None:
    batch = ModelInputs(("input_ids",))
    batch(nn.Identity(), (IDS,), {"attention_mask": MASK})
    assert batch.tokens(torch.zeros(4, 1, 8)) == (None, None)
    assert batch.tokens(torch.zeros(4, 7, 8)) == (None, None)
    mask, ids = batch.tokens(torch.zeros(4, 10, 8))
    assert mask is not None and ids is not None and mask.equal(MASK.flatten().bool()) and ids.equal(IDS.flatten())
    model, layers = converted("llama", MoEConfig(5, 2))
    torch.export.export(model, (), {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}, strict=False)
    assert all(layer.model_inputs.mask is None and layer.model_inputs.token_ids is None for layer in layers)
