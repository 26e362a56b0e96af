"""transformers' engine on several ranks against one process that runs the ranks' batches in turn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

import moeify
from moeify.config import MoEConfig
from moeify.errors import CheckpointError, ConfigError
from moeify.hub import distribution
from tests.moeify import tiny
from tests.moeify.parallel import harness, small
from tests.moeify.tiny import MODELS

CONFIG = MoEConfig(8, 2, method="noise", capacity_factor=1.0, min_capacity=1, shared_experts=1, aux_loss=0.0)


def saved(name: str, config: MoEConfig = CONFIG) -> Path:
    """A checkpoint that all ranks know."""
    place = small.folder()
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        tiny.draw(moeify.convert(MODELS[name](), config)).save_pretrained(place)
    dist.barrier()
    return place


def loss(model: Any, rank: int) -> torch.Tensor:
    ids = torch.randint(1, 101, (2, 9), generator=torch.Generator().manual_seed(rank))
    found: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return found


def case_gradients_are_those_of_one_process(rank: int, world: int) -> None:
    for name, ep in (("llama", 2), ("gpt_neox", world)):  # with copies of the experts, and without; biases
        place = saved(name)
        sizes = DistributedConfig(fsdp_size=world, ep_size=ep)
        model: Any = moeify.load(place, dtype=torch.float32, distributed_config=sizes).train()
        stack = next(p for n, p in model.named_parameters() if n.endswith("mlp.experts.down_proj"))
        assert isinstance(stack, DTensor) and len(stack.to_local()) == 8 // world
        alone: Any = moeify.load(place, dtype=torch.float32).train()
        mine = loss(model, rank)
        torch.autograd.backward(mine)
        total = torch.zeros(())
        for other in range(world):
            term = loss(alone, other) / world
            torch.autograd.backward(term)
            total += term.detach()
        assert any(layer.mlp.record.dropped for layer in alone.modules() if hasattr(layer, "mlp"))
        dist.all_reduce(mean := mine.detach().clone())
        torch.testing.assert_close(mean / world, total)
        wanted = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
        assert (found := small.apart(small.gradients(model), wanted)) < 3e-6, (name, found)
        torch.testing.assert_close(
            moeify.clip_grad_norm_(model, 0.1), torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
        )
        model.save_pretrained(place / "again")
        dist.barrier()
        model.save_pretrained(place / "parts", distributed_checkpoint=True)
        others = DistributedConfig(fsdp_size=world, ep_size=6 - ep)  # 2 for 4 and 4 for 2
        apart: Any = moeify.load(place / "parts", dtype=torch.float32, distributed_config=others)
        loaded = [moeify.load(place / name, dtype=torch.float32).state_dict() for name in ("again", "parts")]
        loaded.append({key: small.full(value) for key, value in apart.state_dict().items()})
        for back in loaded:
            assert all(value.equal(back[key]) for key, value in alone.state_dict().items())
        dist.barrier()
        if rank == 0:
            sorted((place / "parts").glob("*.safetensors"))[-1].unlink()
        dist.barrier()
        with pytest.raises(CheckpointError, match="mismatched tensor") as caught:
            moeify.load(place / "parts", dtype=torch.float32, distributed_config=others)
        assert "\n" not in str(caught.value)
        small.remove(place)


def case_tied_embeddings_stay_tied_over_steps(rank: int, world: int) -> None:
    """The ranks do not divide the vocabulary of 101 evenly."""
    place = saved("llama")
    sizes = DistributedConfig(fsdp_size=world, ep_size=2)
    model: Any = moeify.load(place, dtype=torch.float32, distributed_config=sizes).train()
    alone: Any = moeify.load(place, dtype=torch.float32).train()
    assert alone.lm_head.weight is alone.model.embed_tokens.weight
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, alone)]
    for _ in range(3):
        torch.autograd.backward(mine := loss(model, rank))
        terms = [loss(alone, other) / world for other in range(world)]
        torch.autograd.backward(sum(terms[1:], terms[0]))
        dist.all_reduce(mean := mine.detach().clone())
        torch.testing.assert_close(mean / world, sum(terms[1:], terms[0]).detach())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    small.remove(place)


def case_routers_stay_in_float32(rank: int, world: int) -> None:
    place = saved("llama")
    sizes = DistributedConfig(fsdp_size=world, ep_size=2)
    model: Any = moeify.load(place, dtype=torch.bfloat16, distributed_config=sizes).train()
    torch.autograd.backward(loss(model, rank))
    dtypes = {name: (p.dtype, p.grad.dtype) for name, p in model.named_parameters()}
    assert dtypes["model.layers.1.mlp.router.weight"] == (torch.float32, torch.float32)
    assert dtypes["model.layers.1.mlp.experts.down_proj"] == (torch.bfloat16, torch.bfloat16)
    small.remove(place)


def case_wrong_use_is_one_line(rank: int, world: int) -> None:
    place = saved("llama")
    sizes = DistributedConfig(fsdp_size=world, ep_size=world)
    for change, dtype, match in (
        ({"ep_implementation": "all_to_all"}, torch.float32, "ep_implementation is 'all_to_all'"),
        ({}, torch.float64, "torch divides gradients twice when ep_size is fsdp_size"),
        ({"fsdp_size": 1, "tp_size": world}, torch.float32, "goes beside FSDP only"),
    ):
        with pytest.raises(ConfigError, match=match) as caught:
            moeify.load(place, dtype=dtype, distributed_config=replace(sizes, **change))
        assert "\n" not in str(caught.value)
    odd = saved("llama", MoEConfig(6, 2))
    with pytest.raises(ConfigError, match="6 experts, which 4 ranks cannot share evenly"):
        moeify.load(odd, dtype=torch.float32, distributed_config=sizes)
    other = saved("llama", replace(CONFIG, top_k=1))
    with pytest.raises(ConfigError, match="rank 0 and rank 1 differ in the settings"):
        moeify.load(other if rank == 1 else place, dtype=torch.float32, distributed_config=sizes)
    for folder in (place, odd, other):
        small.remove(folder)


if harness.HAS_EXPERT_PARALLEL:
    test_on_several_ranks = harness.on_several_ranks(__name__, 4)


def test_without_ranks_nothing_changes() -> None:
    model: Any = moeify.convert(MODELS["llama"](), CONFIG)
    distribution.offer_distribution()
    distribution.offer_distribution()
    assert type(model).maybe_distribute_model(model, None, None) is model
