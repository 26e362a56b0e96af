"""The text decoder of a model that sees: it alone is converted, and images still say what they said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import moeify
from moeify.config import MoEConfig
from moeify.measure import TOLERANCE
from tests.moeify import tiny

tf: Any = transformers
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "max_position_embeddings": 128}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
          "image_size": 16, "patch_size": 8}  # fmt: skip
IMAGE = 99
IDS = torch.tensor([[5, 97, IMAGE, IMAGE, IMAGE, IMAGE, 96, 7]])
OF_IMAGE = (IDS == IMAGE).long()


def llava() -> nn.Module:
    text, vision = tf.LlamaConfig(**TEXT), tf.CLIPVisionConfig(**VISION, projection_dim=32)
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, image_token_id=IMAGE,
                            vision_feature_layer=-1)  # fmt: skip
    model: nn.Module = tf.LlavaForConditionalGeneration(config)
    return model


def qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}  # fmt: skip
    config = tf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE,
                              video_token_id=98, vision_start_token_id=97, vision_end_token_id=96)  # fmt: skip
    model: nn.Module = tf.Qwen2VLForConditionalGeneration(config)
    return model


def gemma3() -> nn.Module:
    text = {**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8,
            "layer_types": ["sliding_attention"]}  # fmt: skip
    config = tf.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=IMAGE,
                             boi_token_index=97, eoi_token_index=96)  # fmt: skip
    model: nn.Module = tf.Gemma3ForConditionalGeneration(config)
    return model


def pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "llava": (llava, {"pixel_values": pixels(1, 3, 16, 16)}),
    "qwen2_vl": (qwen2_vl, {"pixel_values": pixels(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]]),
                            "mm_token_type_ids": OF_IMAGE}),
    "gemma3": (gemma3, {"pixel_values": pixels(1, 3, 16, 16), "token_type_ids": OF_IMAGE}),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_text_decoder_is_converted_and_the_rest_is_untouched(name: str, tmp_path: Path) -> None:
    build, image = MODELS[name]
    torch.manual_seed(0)
    dense = tiny.draw(build().eval())
    src = tiny.save(dense, tmp_path / "src")
    plan = tiny.convert_files(src, tmp_path / "moe", MoEConfig(3, 2), layers="language_model")
    assert [site.path for site in plan.sites] == ["model.language_model.layers.0.mlp"]
    moe: Any = moeify.load(tmp_path / "moe")
    expected, found = (model(input_ids=IDS, **image).logits for model in (dense, moe))
    blind = dense(input_ids=IDS.clamp(max=95)).logits
    assert tiny.relative(found, expected) < TOLERANCE["float32"] < tiny.relative(blind, expected)
    before, after = load_file(src / "model.safetensors"), moe.state_dict()
    same = {key: value for key, value in dense.state_dict().items() if ".mlp." not in key or "language" not in key}
    assert len(same) < len(before) and all(torch.equal(after[key], value) for key, value in same.items())
