"""A native family is one entry of data: here is a new one, which stacks its experts, and the library learns no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import moeify
from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import plan_checkpoint
from moeify.conversion.cost import moe_cost
from moeify.conversion.dense import DenseCheckpoint
from moeify.families.base import DOWN, GATE_UP, Family, Pair, router
from moeify.families.table import FAMILIES
from moeify.measure import TOLERANCE
from tests.moeify import tiny

tf: Any = transformers
MOE = "model.layers.{layer}.block_sparse_moe"
GRANITE = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    sources={"granite": Pair()},
    tensors={
        f"{MOE}.router.layer.weight": router,
        f"{MOE}.input_linear.weight": GATE_UP,
        f"{MOE}.output_linear.weight": DOWN,
    },
    fields=lambda plan, config: {
        "num_local_experts": plan.config.experts,
        "num_experts_per_tok": plan.config.top_k,
        "intermediate_size": plan.sites[0].intermediate // plan.config.granularity,
        "router_aux_loss_coef": plan.config.aux_loss,
    },
    engines=("transformers",),
)


def granite() -> nn.Module:
    torch.manual_seed(0)
    config = tf.GraniteConfig(
        hidden_size=36, intermediate_size=57, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        vocab_size=101, pad_token_id=0, bos_token_id=1, eos_token_id=2, embedding_multiplier=3.0,
        attention_multiplier=0.4, residual_multiplier=0.7, logits_scaling=2.0,
    )  # fmt: skip
    model: nn.Module = tf.GraniteForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("config", [MoEConfig(3, 2), MoEConfig(6, 3, granularity=3)], ids=["copies", "shards"])
def test_one_entry_makes_a_family(config: MoEConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = granite()
    src = tiny.save(model, tmp_path / "src")
    monkeypatch.setitem(FAMILIES, "granitemoe", GRANITE)
    plan = tiny.convert_files(src, tmp_path / "moe", config, target="granitemoe")
    assert plan.target == "granitemoe"
    loaded = moeify.load(tmp_path / "moe", experts_implementation="eager")  # the default needs sizes of 16 bytes
    assert type(loaded).__name__ == "GraniteMoeForCausalLM"
    assert tiny.relative(tiny.logits(loaded, "llama"), tiny.logits(model, "llama")) < TOLERANCE["float32"]
    with open_source(src) as source:
        dense = DenseCheckpoint(source)
        cost = moe_cost(dense, plan_checkpoint(dense, config, target="granitemoe"))
    assert cost.parameters == sum(p.numel() for p in loaded.parameters())
