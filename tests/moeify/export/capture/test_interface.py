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
from moeify.errors import MoeifyError, RefusedError
from moeify.export.capture.interface import FlatModel, cache_states, choose_interface, flat_outputs

tf: Any = transformers


def test_a_state_that_is_not_keys_and_values_is_refused() -> None:
    config = tf.MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, state_size=3)
    with pytest.raises(RefusedError, match=r"MambaForCausalLM keeps \w+ between steps"):
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
        choose_interface(Picky(), None)


def test_an_output_without_names_is_numbered_and_only_numbers_are_taken() -> None:
    x, ids = torch.ones(2), torch.ones(2, dtype=torch.long)
    assert list(flat_outputs(x)) == ["output"]
    assert list(flat_outputs((x, ids, x))) == ["output_0", "output_2"]
    assert list(flat_outputs({"a": x, "b": None, "c": ids})) == ["a"]


def test_a_flat_model_takes_tensors_in_the_order_of_its_interface() -> None:
    class Minus(nn.Module):
        def forward(self, *, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - b

    examples = {"b": torch.ones(2, 3), "a": torch.ones(2, 3)}
    interface = choose_interface(Minus(), examples)
    (y,) = FlatModel(Minus(), interface)(torch.full((2, 3), 1.0), torch.full((2, 3), 5.0))
    assert y.unique().tolist() == [4.0] and interface.outputs == ("output",)


def test_dynamic_sizes_are_the_batch_and_the_length_of_token_ids() -> None:
    class Model(nn.Module):
        def forward(self, ids: torch.Tensor, decoder_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return x + ids.sum() + decoder_ids.sum()

    ids = torch.ones(2, 5, dtype=torch.long)
    interface = choose_interface(Model(), {"ids": ids, "decoder_ids": ids, "x": torch.ones(2, 3), "flag": True})
    assert interface.axes == {
        "ids": {0: "batch", 1: "sequence"}, "decoder_ids": {0: "batch", 1: "decoder_sequence"}, "x": {0: "batch"}
    }  # fmt: skip
    shapes = {name: list(value.shape) for name, value in interface.sized(4, 6).items()}
    assert shapes == {"ids": [4, 6], "decoder_ids": [4, 8], "x": [4, 3]}


def test_an_interface_in_float32_keeps_its_integers() -> None:
    class Model(nn.Module):
        def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return x * ids

    examples = {"ids": torch.ones(2, 1, dtype=torch.int32), "x": torch.ones(2, 3, dtype=torch.bfloat16)}
    wide = choose_interface(Model(), examples).in_float32()
    assert [value.dtype for value in wide.inputs.values()] == [torch.int32, torch.float32]


def test_example_inputs_hold_a_tensor() -> None:
    with pytest.raises(MoeifyError, match="Linear has no tensor among its example inputs: give at least one"):
        choose_interface(nn.Linear(2, 2), {"flag": True})
