"""How configurations get smaller, and what the small models are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sweeps.models import example_inputs, set_fields
from sweeps.small_model import Reduction, runnable, small_model


@pytest.mark.parametrize(
    ("name", "value", "smaller"),
    [
        ("hidden_size", 4096, 512),
        ("hidden_size", 12, 12),  # no multiple of 8
        ("hidden_sizes", [64, 128], [8, 16]),
        ("num_hidden_layers", 32, 32),
        ("upsample_groups", 512, 64),
        ("n_group", 8, 8),
        ("downsample_ratio", 16, 16),
        ("vocab_size", 32000, 512),
        ("n_routed_experts", 256, 8),
        ("num_experts_per_tok", 8, 2),
        ("image_size", 1024, 256),
        ("image_size", [1024, 512], [256, 128]),
        ("image_size", 224, 224),
        ("num_frames", 32, 8),
        ("use_cache", True, False),
        ("pad_token_id", 3, 3),
        ("rope_parameters", {"mrope_section": [8, 12, 12]}, {"mrope_section": [1, 1, 2]}),
    ],
)
def test_each_kind_of_field_is_reduced_in_its_way(name: str, value: object, smaller: object) -> None:
    assert Reduction(8, vocabulary=True, pictures=4).of(name, value) == smaller


def test_token_ids_come_into_the_short_vocabulary() -> None:
    short, whole = (Reduction(8, vocabulary=cut, pictures=4) for cut in (True, False))
    assert short.of("image_token_id", 128256) < 512 <= whole.of("image_token_id", 128256)
    assert short.of("image_token_id", 128256) != short.of("video_token_id", 128257)


def test_layers_that_differ_stay_different() -> None:
    config = small_model("gemma4_text").model.config
    heads = [layer.head_dim for layer in config.per_layer_config]
    assert (config.layer_types, heads) == (["sliding_attention", "full_attention"], [32, 64])
    assert type(config).from_dict(config.to_dict()).per_layer_config[1].head_dim == 64


def test_a_model_without_a_forward_gives_way_to_the_first_inside_it() -> None:
    tf: Any = transformers
    config = tf.LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=9)

    class Pair(tf.PreTrainedModel):  # type: ignore[misc]
        config_class = tf.LlamaConfig

        def __init__(self) -> None:
            super().__init__(config)
            self.projection, self.text = nn.Linear(2, 2), tf.LlamaModel(config)

    pair = Pair()
    assert runnable(pair) is pair.text
    assert runnable(pair.text) is pair.text


def test_inputs_are_described_by_shapes_values_and_fields() -> None:
    config = SimpleNamespace(text=SimpleNamespace(width=6))
    given = {
        "ids": {"shape": [2, 3], "dtype": "int64"},
        "states": [{"shape": [1, "2*text.width"]}],
        "mask": {"shape": [2], "dtype": "int64", "value": 1},
        "grid": {"values": [[1, 4, 4]]},
        "use_cache": False,
    }
    made = example_inputs(given, config)
    assert (made["ids"].shape, made["ids"].dtype, made["ids"].is_meta) == ((2, 3), torch.int64, True)
    assert made["states"][0].shape == (1, 12)
    assert made["mask"].tolist() == [1, 1]
    assert made["grid"].tolist() == [[1, 4, 4]]
    assert made["use_cache"] is False


def test_fields_are_set_in_parts_and_in_dictionaries() -> None:
    config = SimpleNamespace(text=SimpleNamespace(rope={"theta": 1}))
    set_fields(config, {"text.rope.sections": [1, 2], "text.width": 4})
    assert (config.text.rope, config.text.width) == ({"theta": 1, "sections": [1, 2]}, 4)
