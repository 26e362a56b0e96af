from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

import moeify
from moeify.config import MoEConfig
from moeify.tolerances import TOLERANCE
from tests.moeify import tiny


def test_stock_models_take_our_experts_by_name_after_register(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    tiny.convert_files(src, tmp_path / "moe", MoEConfig(experts=3, top_k=2))
    moeify.register()
    moeify.register()
    auto: Any = transformers.AutoModelForCausalLM
    eager, ours = (
        auto.from_pretrained(tmp_path / "moe", experts_implementation=name).eval() for name in ("eager", "moeify")
    )
    assert set(ours.get_experts_implementation().values()) == {"moeify"}
    assert tiny.relative(tiny.logits(ours, "llama"), tiny.logits(eager, "llama")) < TOLERANCE["float32"]
