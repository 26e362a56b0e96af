from __future__ import annotations

from pathlib import Path

import pytest

from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import plan_checkpoint
from moeify.conversion.cost import moe_cost
from moeify.conversion.summary import dense_side
from tests.moeify import tiny

CONFIG = MoEConfig(experts=5, top_k=3)


@pytest.mark.parametrize(
    ("name", "target"), [("llama", "mixtral"), ("llama", "qwen2_moe"), ("qwen3", "qwen3_moe"), ("gpt2", "moeify")]
)
def test_the_cost_that_is_told_is_the_cost_of_what_is_written(name: str, target: str, tmp_path: Path) -> None:
    src = tiny.save(tiny.build(name), tmp_path / "src")
    with open_source(src) as source:
        plan = plan_checkpoint(source, CONFIG, target=target)
        dense, itemsize = dense_side(source)
    cost = moe_cost(dense, plan, itemsize)
    tiny.convert_files(src, tmp_path / "moe", CONFIG, target=target)
    with open_source(tmp_path / "moe") as written:
        nbytes = sum(info.nbytes for info in written.tensors.values())
    assert cost.bytes == nbytes == 4 * cost.parameters


def test_flops_and_active_parameters_of_a_llama(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    with open_source(src) as source:
        plan = plan_checkpoint(source, CONFIG)
        dense, itemsize = dense_side(source)
    ffn = 3 * tiny.HIDDEN * tiny.INTERMEDIATE
    attention = 2 * tiny.HIDDEN * tiny.HIDDEN + 2 * tiny.HIDDEN * (tiny.HIDDEN // 3)
    head = tiny.HIDDEN * tiny.VOCABULARY
    assert dense.flops == 2 * (tiny.LAYERS * (ffn + attention) + head)
    moe = moe_cost(dense, plan, itemsize)
    router = 5 * tiny.HIDDEN
    assert moe.flops - dense.flops == 2 * tiny.LAYERS * (2 * ffn + router)
    assert moe.active - dense.active == tiny.LAYERS * (2 * ffn + router)
    assert moe.parameters - dense.parameters == tiny.LAYERS * (4 * ffn + router)
