from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import moeify
from moeify.config import MoEConfig
from moeify.measure import TOLERANCE
from tests.moeify import tiny


def test_what_sixteen_bits_do_not_hold_is_stored_in_float32(tmp_path: Path) -> None:
    model: Any = tiny.build("gemma").bfloat16()
    src = tiny.save(model, tmp_path / "src")
    dense = load_file(src / "model.safetensors")
    tiny.convert_files(src, tmp_path / "moe", MoEConfig(3, 2), target="mixtral", dtype="BF16")
    stored = load_file(tmp_path / "moe/model.safetensors")
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(stored[name], 1 + dense[name].float())
    embedding = dense["model.embed_tokens.weight"]
    assert torch.equal(stored["model.embed_tokens.weight"], embedding.float() * tiny.HIDDEN**0.5)
    assert torch.equal(stored["lm_head.weight"], embedding)
    moe = moeify.load(tmp_path / "moe", dtype=torch.float32, experts_implementation="eager")
    expected = tiny.logits(moeify.load(src, dtype=torch.float32), "llama")
    assert tiny.relative(tiny.logits(moe, "llama"), expected) < TOLERANCE["float32"]
