"""What a GGUF file says of a native MoE: llama.cpp's keys for its config, and how its experts are stacked.

What is true of one family only is in that family's file. llama.cpp's converter, `convert_hf_to_gguf.py`, writes the
same keys and tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeify.errors import CheckpointError, RefusedError
from moeify.families.base import (
    Config,
    ExpertWeight,
    Family,
    Fields,
    Gguf,
    Held,
    as_it_is,
    full_attention,
    head_dim,
    kv_heads,
)
from moeify.families.table import FAMILIES, traits
from moeify.families.words import MOEIFY
from moeify.plan import Plan

if TYPE_CHECKING:
    from gguf import TensorNameMap

_SUFFIXES = (".weight", ".bias", ".scale")
_STOPS = 1e30  # a frequency that is divided by it turns nothing


def gguf_of(plan: Plan, config: Config) -> Gguf:
    """Return how a GGUF file holds the target of a plan, for which `why_not_gguf` has found no reason."""
    found = FAMILIES[plan.target].gguf
    assert found is not None
    return _form(found, config)


def _form(form: Gguf, config: Config) -> Gguf:
    return form.unless[1] if form.unless and form.unless[0](config) else form


def why_not_gguf(plan: Plan, config: Config) -> str | None:
    """Return why the target of a plan is not written as GGUF, None if it is.

    Args:
        plan: What is converted.
        config: The config of the MoE.
    """
    known = ", ".join(name for name, family in FAMILIES.items() if family.gguf)
    if plan.target == MOEIFY:
        return f"a GGUF file cannot hold the moeify format, which llama.cpp does not read: choose --to {known}"
    form = FAMILIES[plan.target].gguf
    if form is None:
        return f"--to {plan.target} is not written as GGUF: choose {known}, or write a folder"
    form = _form(form, config)
    why = next((condition.otherwise for condition in form.conditions if not condition.holds(config)), None)
    kind = _rope(config).get("rope_type", "default")
    if kind not in form.ropes:
        why = f"it does not scale rotary positions as {kind} does there"
    return why and f"llama.cpp would not compute this {plan.target} ({form.architecture}) as it is meant: {why}"


def gguf_remarks(plan: Plan, config: Config) -> list[str]:
    """Return what a user must know of a GGUF file: the traits of its family, and what llama.cpp does with it.

    Args:
        plan: What is converted, for a family for which `why_not_gguf` has no reason.
        config: The config of the dense model, defaults filled in.
    """
    found, form = traits(plan), FAMILIES[plan.target].gguf
    assert form is not None
    if form.differs:
        found.append(form.differs)
    window, first = config.get("sliding_window"), _first_length(config)
    if window and not form.windows:
        found.append(f"llama.cpp has no sliding window there: it computes the same up to {window} tokens")
    if _rope(config).get("rope_type") == "longrope":
        found.append(f"llama.cpp takes the long factors for every text as soon as its context is over {first}")
    return found


def stacked(family: Family, form: Gguf) -> Mapping[str, Held]:
    """Return what the tensors of a layer hold in a GGUF file; those besides the experts have their native names."""
    others = {key: held for key, held in family.tensors.items() if not isinstance(held, ExpertWeight)}
    # llama.cpp has one tensor for a weight of all experts of a layer
    return {**others, **{f"blk.{{layer}}.ffn_{word}_exps.weight": held for word, held in form.experts.items()}}


def stored_as(form: Gguf, layers: int, name: str) -> dict[str, Callable[[Tensor, Config], Tensor]]:
    """Return what stands in a GGUF file for a native tensor: names, and what the values are computed by.

    Args:
        form: How it holds the family.
        layers: How many there are.
        name: Of the tensor in the native format, or what `stacked` calls it.

    Raises:
        CheckpointError: The gguf library does not know the architecture.
        RefusedError: llama.cpp has no place for the tensor.
    """
    parts: dict[str, Callable[[Tensor, Config], Tensor]] = {name: as_it_is}
    for rewrite in form.rewrites:
        if found := re.fullmatch(rewrite.pattern, name):
            parts = {found.expand(part): compute for part, compute in rewrite.parts.items()}
            break
    names = _names(form.architecture, layers)
    found_at = {}
    for part, compute in parts.items():
        # what is a bias of no module, the library knows as one
        place = names.get_name(re.sub(r"_bias$", ".bias", part), _SUFFIXES)
        if place is None:
            raise RefusedError(f"llama.cpp's {form.architecture} has no place for {name}: write a folder")
        found_at[place] = compute
    return found_at


@cache
def _names(architecture: str, layers: int) -> TensorNameMap:
    import gguf

    known = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise CheckpointError(f"the gguf package has no {architecture}: pip install --upgrade gguf")
    return gguf.get_tensor_name_map(known[architecture], layers)


def keys(plan: Plan, config: Config) -> Fields:
    """Return what a GGUF file says of the MoE, by the names of the `add_…` methods of `gguf.GGUFWriter`.

    What is None in an entry is not said.

    Args:
        plan: What is converted, for a family for which `why_not_gguf` has no reason.
        config: The config of the MoE.
    """
    full = full_attention(config)
    always: Fields = {
        "block_count": full["num_hidden_layers"],
        "context_length": full["max_position_embeddings"],
        "embedding_length": full["hidden_size"],
        "feed_forward_length": full["intermediate_size"],
        "head_count": full["num_attention_heads"],
        "head_count_kv": kv_heads(full),
        "key_length": full.get("head_dim"),
        "value_length": full.get("head_dim"),
        "layer_norm_rms_eps": full.get("rms_norm_eps", full.get("norm_eps")),
        "expert_count": plan.config.experts,
        "expert_used_count": plan.config.top_k,
        **_rope_keys(full),
    }
    found = {**always, **gguf_of(plan, config).keys(config)}
    return {name: value for name, value in found.items() if value is not None}


def _rope(config: Config) -> Config:
    found: Config = full_attention(config).get("rope_parameters") or {}
    return found


def _rope_keys(config: Config) -> Fields:
    from gguf import RopeScalingType

    rope = _rope(config)
    found: Fields = {"rope_freq_base": rope.get("rope_theta")}
    match rope.get("rope_type"):
        case "linear":
            found |= {"rope_scaling_type": RopeScalingType.LINEAR, "rope_scaling_factor": rope["factor"]}
        case "yarn":
            found |= {
                "rope_scaling_type": RopeScalingType.YARN,
                "rope_scaling_factor": rope["factor"],
                "rope_scaling_orig_ctx_len": _first_length(config),
            }
            names = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
            found |= {f"rope_scaling_yarn_{key}": rope[name] for name, key in names.items() if rope.get(name)}
        case "longrope":
            found |= {
                "rope_scaling_type": RopeScalingType.LONGROPE,
                "rope_scaling_orig_ctx_len": _first_length(config),
                "rope_scaling_attn_factors": rope.get("attention_factor") or _long_factor(config),
            }
    return found


def _first_length(config: Config) -> int:
    """Return the context length before it was extended."""
    rope = _rope(config)
    return int(rope.get("original_max_position_embeddings") or config["max_position_embeddings"])


def _long_factor(config: Config) -> float:
    """Return by how much long-context Phi scales its attention (Ding et al. 2024, arXiv:2402.13753)."""
    before = _first_length(config)
    scale = config["max_position_embeddings"] / before
    return math.sqrt(1 + math.log(scale) / math.log(before)) if scale > 1 else 1.0


def rope_tensors(config: Config) -> dict[str, Tensor]:
    """Return the factors that llama.cpp divides rotary frequencies by, by their names in a GGUF file."""
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, head_dim(config))}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]) for kind in ("long", "short")}
    if rope.get("rope_type") == "proportional":
        return {"rope_freqs.weight": _proportional_factors(rope, head_dim(full_attention(config)))}
    return {}


def _proportional_factors(rope: Config, size: int) -> Tensor:
    """Return one factor for what is rotated, and for the rest, which stands behind it in each half, what stops it."""
    rotated = int(rope.get("partial_rotary_factor", 1.0) * size // 2)
    return torch.tensor([float(rope.get("factor", 1.0))] * rotated + [_STOPS] * (size // 2 - rotated))


def _llama3_factors(rope: Config, size: int) -> Tensor:
    """Return one for short waves, the whole factor for long ones, and a mixture between (Llama 3.1)."""
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    first, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((first / waves - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors
