"""Layers by themselves, with sizes that are multiples of nothing, one for each router."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeify import routers
from moeify.config import MoEConfig
from moeify.layers import Experts, SoftMoE, SparseMoE
from moeify.layers.model_inputs import ModelInputs
from moeify.routing.balance import weighted_sum

HIDDEN, INTERMEDIATE, VOCABULARY = 13, 17, 23

CONFIGS: dict[str, MoEConfig] = {
    "softmax": MoEConfig(5, 2),
    "switch": MoEConfig.switch(5),
    "gshard": MoEConfig.gshard(5),
    "st_moe": MoEConfig.st_moe(5),
    "noisy_topk": MoEConfig.noisy_topk(5, 2),
    "deepseek_v3": MoEConfig.deepseek_v3(6, 2, router={"n_group": 3, "topk_group": 2}),
    "expert_choice": MoEConfig.expert_choice(5),
    "sinkhorn": MoEConfig(5, 2, router="sinkhorn", aux_loss=0.0),
    "hash": MoEConfig(5, 1, router=routers.Hash(vocab_size=VOCABULARY), aux_loss=0.0),
    "soft": MoEConfig(5, 2, router=routers.Soft(slots=3), aux_loss=0.0),
}


def layer(config: MoEConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A layer in training mode with random weights."""

    def experts(count: int) -> Experts:
        return Experts(HIDDEN, INTERMEDIATE, num_experts=count, activation="silu", gated=True,
                       up_rows=2 * INTERMEDIATE, dtype=dtype)  # fmt: skip

    router: Any = config.router.module(HIDDEN, config, dtype=dtype)
    shared = experts(config.shared_experts) if config.shared_experts else None
    kind = SoftMoE if config.router.mixes_tokens else SparseMoE
    made: Any = kind(router, experts(config.experts), shared, path="model.layers.1.mlp")
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    if config.router.needs_token_ids:
        made.router.table.copy_(torch.arange(VOCABULARY) % config.experts)
    return made


def inputs(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tell(made: Any, *, mask: Tensor | None = None, token_ids: Tensor | None = None) -> None:
    """Tell a layer what the model around it would tell it."""
    made.model_inputs = ModelInputs()
    made.model_inputs.mask, made.model_inputs.token_ids = mask, token_ids


SPARSE = [name for name in CONFIGS if name != "soft"]
LEARNED = [name for name in SPARSE if name != "hash"]


def call(layer: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    tell(layer, mask=mask, token_ids=torch.arange(x[..., 0].numel()).view(x.shape[:-1]) % VOCABULARY)
    torch.manual_seed(3)
    out: Tensor = layer(x)
    return out


def gradients(layer: Any, out: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    loss = weighted_sum(layer.losses(), layer.config)
    total = out.square().sum()
    torch.autograd.backward(total if loss is None or layer.config.attach_losses else total + loss)
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=name)
