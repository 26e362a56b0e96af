from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import moeify
from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import plan_checkpoint
from moeify.conversion.cost import Cost, dense_cost, least_bytes, moe_cost
from moeify.conversion.dense import DenseCheckpoint
from tests.moeify import tiny

CONFIG = MoEConfig(experts=5, top_k=3)
SHARDS = MoEConfig(6, 3, granularity=3, shared_experts=4)
HASH = MoEConfig(5, 1, router=moeify.routers.Hash(vocab_size=tiny.VOCABULARY), aux_loss=0.0)


def costs(src: Path, config: MoEConfig, target: str = "auto") -> tuple[Cost, Cost]:
    with open_source(src) as source:
        dense = DenseCheckpoint(source)
        return dense_cost(dense), moe_cost(dense, plan_checkpoint(dense, config, target=target))


@pytest.mark.parametrize(
    ("name", "target", "config"),
    [
        ("llama", "mixtral", CONFIG),
        ("llama", "qwen2_moe", CONFIG),
        ("qwen3", "qwen3_moe", CONFIG),
        ("gpt2", "moeify", CONFIG),  # with biases
        ("gpt2", "moeify", SHARDS),
        ("llama", "moeify", SHARDS),  # without
        ("t5", "moeify", SHARDS),
        ("phi3", "moeify", MoEConfig(5, 2, router="noisy_topk")),
        ("llama", "moeify", MoEConfig.deepseek_v3(6, 2, router={"n_group": 3, "topk_group": 2})),
        ("opt", "moeify", MoEConfig(5, 2, router=moeify.routers.Soft(slots=2), aux_loss=0.0)),
        ("llama", "moeify", HASH),
    ],
)
def test_the_cost_that_is_told_is_the_cost_of_what_is_written(
    name: str, target: str, config: MoEConfig, tmp_path: Path
) -> None:
    src = tiny.save(tiny.build(name), tmp_path / "src")
    _, cost = costs(src, config, target)
    tiny.convert_files(src, tmp_path / "moe", config, target=target)
    with open_source(tmp_path / "moe") as written:
        nbytes = sum(info.nbytes for info in written.tensors.values())
        buffers = [info for name, info in written.tensors.items() if name.endswith(("router.table", "selection_bias"))]
    assert cost.bytes == nbytes == 4 * cost.parameters + sum(info.nbytes for info in buffers)
    model: Any = moeify.load(tmp_path / "moe", experts_implementation="eager")
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_flops_and_active_parameters_of_a_llama(tmp_path: Path) -> None:
    dense, moe = costs(tiny.save(tiny.build("llama"), tmp_path / "src"), CONFIG)
    ffn = 3 * tiny.HIDDEN * tiny.INTERMEDIATE
    attention = 2 * tiny.HIDDEN * tiny.HIDDEN + 2 * tiny.HIDDEN * (tiny.HIDDEN // 3)
    head = tiny.HIDDEN * tiny.VOCABULARY
    assert dense.flops == 2 * (tiny.LAYERS * (ffn + attention) + head)
    router = 5 * tiny.HIDDEN
    assert moe.flops - dense.flops == 2 * tiny.LAYERS * (2 * ffn + router)
    assert moe.active - dense.active == tiny.LAYERS * (2 * ffn + router) + head  # no longer tied
    assert moe.parameters - dense.parameters == tiny.LAYERS * (4 * ffn + router) + head


def test_rows_whose_number_depends_on_the_data_count_as_every_token() -> None:
    class Picking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.every, self.some = nn.Linear(3, 5), nn.Linear(3, 7)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.every(x), self.some(x[x[:, 0] > 0])

    model = Picking()
    graph_module = torch.export.export(model, (torch.ones(4, 3),), strict=False).module()
    dense: Any = SimpleNamespace(model=model, graph_module=graph_module, source=SimpleNamespace(nbytes=0))
    assert dense_cost(dense).flops == 2 * (3 * 5 + 3 * 7)


def test_active_parameters_of_shards_with_biases(tmp_path: Path) -> None:
    dense, moe = costs(tiny.save(tiny.build("gpt2"), tmp_path / "src"), SHARDS)
    shard, bias = 2 * tiny.HIDDEN * tiny.INTERMEDIATE // 3, tiny.INTERMEDIATE // 3
    router, met = 6 * tiny.HIDDEN, 3 + 4
    assert moe.flops - dense.flops == 2 * tiny.LAYERS * ((met - 3) * shard + router)
    # each shard has the bias of the down projection whole
    more = (met - 3) * (shard + bias) + (met - 1) * tiny.HIDDEN + router
    assert moe.active - dense.active == tiny.LAYERS * more


def test_a_native_checkpoint_costs_what_the_same_layers_cost_in_moeify_format(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    (_, native), (_, ours) = (costs(src, CONFIG, target) for target in ("mixtral", "moeify"))
    head = tiny.VOCABULARY * tiny.HIDDEN  # of its own: engines do not read tied ones
    more = {"parameters": ours.parameters + head, "active": ours.active + head, "bytes": ours.bytes + 4 * head}
    assert native == ours._replace(**more)


@pytest.mark.parametrize(("name", "granularity"), [("llama", 1), ("llama", 3), ("phi3", 1), ("gpt2", 1)])
def test_the_least_that_is_written_is_the_experts(name: str, granularity: int, tmp_path: Path) -> None:
    config = MoEConfig(6, 3, granularity=granularity)
    with open_source(tiny.save(tiny.build(name), tmp_path / "src")) as source:
        dense = DenseCheckpoint(source)
        plan = plan_checkpoint(dense, config, target="moeify")
        least = 6 // granularity * (2 + (name != "gpt2")) * tiny.HIDDEN * tiny.INTERMEDIATE * tiny.LAYERS
        assert (least_bytes(dense, plan), least_bytes(dense, plan, "BF16")) == (4 * least, 2 * least)
