from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeify.hub.stock_experts import through_moeify
from moeify.measure import TOLERANCE

tf: Any = transformers
_SIZES = {"vocab_size": 101, "hidden_size": 36, "intermediate_size": 57, "num_hidden_layers": 1,
          "num_attention_heads": 3, "num_key_value_heads": 1, "num_experts_per_tok": 2}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_SIZES, num_local_experts=5)),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**_SIZES, num_experts=5)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**_SIZES, num_local_experts=5, head_dim=12)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_stock_moe_gives_what_it_gave(name: str) -> None:
    torch.manual_seed(0)
    model: Any = MODELS[name]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.set_experts_implementation("eager")
    ids = torch.randint(0, 101, (2, 9))
    with torch.no_grad():
        expected = model(ids).logits
        with through_moeify(model):
            assert model.config._experts_implementation == "moeify"
            result = model(ids).logits
    assert float((result - expected).abs().max() / expected.abs().max()) <= TOLERANCE["float32"]
    assert model.config._experts_implementation == "eager"


def test_a_model_that_is_not_from_transformers_stays_as_it_is() -> None:
    before = set(ALL_EXPERTS_FUNCTIONS)
    with through_moeify(nn.Linear(2, 3)):
        assert set(ALL_EXPERTS_FUNCTIONS) == before
