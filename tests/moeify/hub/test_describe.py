"""Checkpoints of every format have one kind of description."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.summary import Summary
from moeify.hub.describe import describe
from tests.moeify import tiny

CONFIG = MoEConfig(4, 2)


def seen(folder: Path) -> Summary:
    with open_source(folder) as source:
        return describe(source, CONFIG)


@pytest.mark.parametrize("target", ["mixtral", "moeify"])
def test_what_convert_wrote_is_what_it_planned(target: str, tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    tiny.convert_files(src, tmp_path / "moe", CONFIG, target=target)
    dense, moe = seen(src), seen(tmp_path / "moe")
    assert dense.layers == {} and dense.plan is not None and dense.moe is not None
    assert list(moe.layers) == [site.path for site in dense.plan.sites]
    assert all((layer.num_experts, layer.top_k) == (4, 2) for layer in moe.layers.values())
    head = 0 if target == "mixtral" else tiny.VOCABULARY * tiny.HIDDEN  # tied there; what is planned is Mixtral
    assert moe.dense.flops == dense.moe.flops and moe.dense.parameters + head == dense.moe.parameters
    assert moe.dense.active + head == dense.moe.active and moe.dense.bytes + 4 * head == dense.moe.bytes
