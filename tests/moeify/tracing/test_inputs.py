from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from moeify.errors import MoeifyError
from moeify.tracing.inputs import candidate_inputs, part_inputs
from tests.moeify import tiny


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_first_guess_is_accepted(name: str) -> None:
    model = tiny.build(name)
    given = next(candidate_inputs(model))
    tensors = {key: value for key, value in given.items() if isinstance(value, torch.Tensor)}
    assert all(value.is_meta for value in tensors.values())
    model(**{**given, **{key: torch.zeros_like(value, device="cpu") for key, value in tensors.items()}})


def test_models_with_two_inputs_get_both_in_the_end() -> None:
    tower = {"hidden_size": 12, "intermediate_size": 29, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.CLIPConfig(text_config=tower, vision_config={**tower, "image_size": 16, "patch_size": 8})
    guesses: list[dict[str, Any]] = list(candidate_inputs(tf.CLIPModel(config)))
    assert "pixel_values" not in guesses[0]
    assert any(set(guess) >= {"input_ids", "pixel_values"} for guess in guesses)
    assert guesses[1]["pixel_values"].shape[-2:] == (16, 16)


def test_what_the_forward_requires_is_given_from_the_first_guess_on() -> None:
    sizes = {"hidden_size": 12, "intermediate_size": 29, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    config = tf.Blip2Config(vision_config=vision, qformer_config={**sizes, "encoder_hidden_size": 12},
                            text_config={"model_type": "gpt2", "n_embd": 12, "n_layer": 1, "n_head": 2})  # fmt: skip
    model = tf.Blip2Model(config)
    assert {"input_ids", "pixel_values"} <= next(candidate_inputs(model)).keys()
    (first, *_) = candidate_inputs(model.qformer)
    assert isinstance(first["query_embeds"], torch.Tensor) and first["query_embeds"].shape[-1] == 12


def test_an_encoder_of_sound_gets_a_mask_of_its_frames_in_the_end() -> None:
    config = tf.AudioFlamingo3EncoderConfig(
        hidden_size=12, intermediate_size=29, num_hidden_layers=1, num_attention_heads=2, max_source_positions=20
    )
    guesses: list[dict[str, Any]] = list(candidate_inputs(tf.AudioFlamingo3Encoder(config)))
    masked = next(guess for guess in guesses if "input_features_mask" in guess)
    assert masked["input_features_mask"].shape[1] == masked["input_features"].shape[2] == 40


def test_models_from_elsewhere_are_refused_with_their_arguments() -> None:
    with pytest.raises(MoeifyError, match=r"its forward takes \(input\); pass example_inputs"):
        next(candidate_inputs(nn.Linear(3, 3)))


def test_parts_get_activations_as_wide_as_their_first_weight() -> None:
    guesses: list[dict[str, Any]] = list(part_inputs(nn.Sequential(nn.LayerNorm(7))))
    assert {guess["input"].shape[-1] for guess in guesses} == {7}
    (image,) = part_inputs(nn.Sequential(nn.Conv2d(5, 8, 1), nn.ReLU()))
    assert isinstance(image["input"], torch.Tensor)
    assert image["input"].shape[:2] == (2, 5)
    assert list(part_inputs(nn.Identity())) == []
