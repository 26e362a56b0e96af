from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
import transformers
from torch import nn

import moeify
from moeify.errors import RefusedError
from moeify.export.capture import cache_states, interface

tf: Any = transformers


def test_a_state_that_is_not_keys_and_values_is_refused() -> None:
    config = tf.MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, state_size=3)
    with pytest.raises(RefusedError, match="layer 0 of MambaForCausalLM keeps LinearAttentionLayer between steps"):
        cache_states(tf.MambaForCausalLM(config).eval())


def test_a_state_that_holds_more_than_keys_and_values_is_refused() -> None:
    layer = tf.cache_utils.DynamicIndexedLayer()
    layer.keys = layer.values = torch.zeros(1, 2, 3, 4)
    cache = tf.DynamicCache()
    cache.layers = [layer]
    output = SimpleNamespace(past_key_values=cache)

    class Indexed(nn.Module):
        device = torch.device("cpu")

        def forward(self, **_: Any) -> Any:
            return output

    with pytest.raises(RefusedError, match="layer 0 of Indexed keeps DynamicIndexedLayer between steps"):
        cache_states(Indexed())


def test_a_model_of_text_and_images_takes_both(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = {"vocab_size": 101, "eos_token_id": 2, **sizes}, {"image_size": 16, "patch_size": 8, **sizes}
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    assert moeify.export_onnx(tf.CLIPModel(config).eval(), tmp_path / "clip.onnx").passed
    assert [value.name for value in onnx.load(tmp_path / "clip.onnx").graph.input] == ["input_ids", "pixel_values"]


def test_a_forward_that_does_not_run_is_one_line() -> None:
    class Picky(nn.Module):
        config, main_input_name = tf.BertConfig(), "input_ids"

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            raise ValueError(f"no tokens\nbut {input_ids.shape}")

    with pytest.raises(RefusedError, match=r"^Picky does not run .* \(ValueError: no tokens\); use .*example_inputs$"):
        interface(Picky(), None)
