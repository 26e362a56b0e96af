"""The shared expert of Qwen's formats, whose output a sigmoid of the token multiplies.

At zero the sigmoid is one half, so down projections count twice. With an idle shared expert its gate is not zero,
because llama.cpp divides by it.
"""

from __future__ import annotations

import torch

from moeify.config import MoEConfig
from moeify.config.contracts import StartValue
from moeify.families.base import Config, Fields, Held, expert_size, random_rows, shared_expert
from moeify.plan import Plan, Site

IDLE = 128  # intermediate size of an idle one: as narrow as quantized kernels and eight parallel devices take it


def _gate(name: str, site: Site, config: MoEConfig) -> StartValue:
    if config.shared_experts:
        return StartValue((1, site.hidden), None, lambda: torch.zeros(1, site.hidden), short=True)
    return random_rows(1)(name, site, config)


def gated_shared_expert(moe: str) -> dict[str, Held]:
    """Return the tensors of the shared expert of a layer at `moe`."""
    return {**shared_expert(f"{moe}.shared_expert", IDLE, 2.0), f"{moe}.shared_expert_gate.weight": _gate}


def shared_size(plan: Plan) -> int:
    """Return its intermediate size."""
    return plan.config.shared_experts * expert_size(plan) or IDLE


def qwen_keys(config: Config) -> Fields:
    """Return the keys of a GGUF file."""
    return {
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
    }
