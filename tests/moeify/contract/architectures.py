"""Twenty kinds of models: the dozen of `tiny`, and heads, parts and encoders that others bring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.moeify import tiny

tf: Any = transformers
_TEXT = {"hidden_size": 36, "intermediate_size": 57, "num_hidden_layers": 3, "num_attention_heads": 3,
         "num_key_value_heads": 1, "vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
_BERT = {key: value for key, value in _TEXT.items() if key not in {"num_key_value_heads"}}
_IMAGE = {"hidden_size": 36, "intermediate_size": 57, "num_hidden_layers": 2, "num_attention_heads": 3,
          "image_size": 16, "patch_size": 4}  # fmt: skip


def _llava() -> nn.Module:
    text, vision = tf.LlamaConfig(**_TEXT), tf.CLIPVisionConfig(**_IMAGE)
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=99, image_seq_length=16)
    model: nn.Module = tf.LlavaForConditionalGeneration(config)
    return model


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "llama_classifier": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**_TEXT, num_labels=3)),
    "qwen2_reward": lambda: tf.Qwen2ForSequenceClassification(tf.Qwen2Config(**_TEXT, num_labels=1)),
    "qwen3_embeddings": lambda: tf.Qwen3Model(tf.Qwen3Config(**_TEXT, head_dim=12)),
    "bert_classifier": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_BERT, num_labels=3)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_TEXT, head_dim=12)),
    "distilbert": lambda: tf.DistilBertForMaskedLM(
        tf.DistilBertConfig(dim=36, hidden_dim=57, n_layers=3, n_heads=3, vocab_size=101)
    ),
    "llava": _llava,
}
NAMES = (*tiny.MODELS, *OTHERS)


def build(name: str) -> Any:
    """A model with random weights that matter."""
    if name in tiny.MODELS:
        return tiny.build(name)
    torch.manual_seed(0)
    return tiny.draw(OTHERS[name]().eval())


def inputs(name: str) -> dict[str, Tensor]:
    """Inputs without labels."""
    if name in tiny.MODELS:
        return tiny.inputs(name)
    ids = torch.randint(3, 98, (3, 21), generator=torch.Generator().manual_seed(1))
    if name != "llava":
        return {"input_ids": ids}
    ids[:, 2:18] = 99
    return {"input_ids": ids, "pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))}


def labels(name: str) -> dict[str, Tensor]:
    """Labels, for a model that computes a loss."""
    if name == "vit" or name.endswith("_classifier"):
        return {"labels": torch.tensor([0, 1, 1])}
    if name == "qwen2_reward":
        return {"labels": torch.tensor([0.1, 0.7, -0.4])}
    if name == "qwen3_embeddings":
        return {}
    given = inputs(name)
    return {"labels": given.get("decoder_input_ids", given["input_ids"]).clone()}
