"""What several ranks write together is what one process would have written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import moeify
from moeify.config import MoEConfig
from moeify.errors import CheckpointError, ConfigError
from moeify.parallel.saving import save
from tests.moeify.parallel import harness, small
from tests.moeify.tiny import MODELS


def converted() -> Any:
    torch.manual_seed(0)
    return moeify.convert(MODELS["llama"](), MoEConfig(4, 2, method="noise", aux_loss=0.0))


def case_every_engine_writes_the_same_files(rank: int, world: int) -> None:
    place, whole = small.folder(), converted()
    wanted = {name: value.clone() for name, value in whole.state_dict().items()}
    for engine in ("none", "ddp", "fsdp"):
        mesh = small.mesh(world, 2)
        model: Any = moeify.parallelize(converted(), mesh["ep"])
        if engine == "fsdp":
            for layer in model.model.layers:
                fully_shard(layer.mlp.experts, mesh=mesh["efsdp"])
            fully_shard(model, mesh=mesh._flatten("dp"))
        elif engine == "ddp":
            model = small.wrap(model, engine, mesh)
        moeify.save(model, place / engine)
        back = moeify.load(place / engine)
        for name, value in back.state_dict().items():
            assert value.equal(wanted[name]), (engine, name)
        stored = load_file(place / engine / "model.safetensors").keys()
        assert stored == wanted.keys() - {"lm_head.weight"}, "it is tied"
        assert sorted(os.listdir(place / engine)) == ["config.json", "generation_config.json", "model.safetensors"]
    dist.barrier()
    with pytest.raises(CheckpointError, match="exists" if rank == 0 else "rank 0 could not write"):
        moeify.save(model, place / "none")
    small.remove(place)


def case_one_tensor_is_whole_at_a_time(rank: int, world: int) -> None:
    model = moeify.parallelize(converted(), small.mesh(world, 2)["ep"])
    place, alive, most = small.folder(), 0, 0
    original = DTensor.full_tensor

    def counted(self: DTensor, **kwargs: Any) -> torch.Tensor:
        nonlocal alive, most
        whole: torch.Tensor = original(self, **kwargs)
        alive += 1
        most = max(most, alive)
        import weakref

        def gone() -> None:
            nonlocal alive
            alive -= 1

        weakref.finalize(whole, gone)
        return whole

    DTensor.full_tensor = counted  # type: ignore[method-assign]
    try:
        moeify.save(model, place / "out")
    finally:
        DTensor.full_tensor = original  # type: ignore[method-assign]
    assert 1 <= most <= 2
    small.remove(place)


test_on_several_ranks = harness.on_several_ranks(__name__, 2)


def test_without_ranks_it_saves_as_save_pretrained_does(tmp_path: Path) -> None:
    model = converted()
    save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (moeify.load(tmp_path / name).state_dict() for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    assert (tmp_path / "ours" / "config.json").read_text() == (tmp_path / "theirs" / "config.json").read_text()


def test_a_model_of_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model of transformers: save it with torch\.distributed\.checkpoint"):
        save(torch.nn.Linear(2, 2), tmp_path / "out")
