"""A small model of a registered type with weights that make every part matter, and inputs that it accepts."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from moeify.measure import fill
from moeify.tracing.inputs import candidate_inputs
from sweeps.models import build, looked_up, model_types

# Widths are divided by one number each, which keeps the ratios between them that a model relies on.
WIDTH = re.compile(r"dim|size|width|^d_|n_embd|n_inner|hidden|rank|channels|features|mrope_section|expand")
NO_WIDTH = re.compile(
    r"vocab|image|patch|kernel|window|position|seq|length|chunk|block_size|batch|crop|sample|^num_(?!features)|max_|codebook_size"
    r"|group|stride|bins|mel|layers|buckets|num_channels|in_channels|text_config|temporal|downsample|d_conv|grid|factor"
)
EXPERTS = re.compile(r"^(num|n|moe_num)_(local_|routed_)?experts$|num_experts_per_tok$|^top_k_experts$")
MOST = 150_000_000  # parameters
VOCABULARY = 512


@dataclass(frozen=True)
class Small:
    """A model in evaluation mode, inputs that it accepts, and whether they were looked up (or guessed)."""

    model: Any
    inputs: dict[str, Any]
    looked_up: bool
    task: str

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def small_model(model_type: str) -> Small:
    """Return the smallest form of a model type that can be built and run.

    Raises:
        Exception: what stopped the last attempt.
    """
    task, facts = model_types()[model_type], looked_up(model_type)
    meta = build(model_type, task, facts.get("config", {}))
    failure: Exception = ValueError(f"more than {MOST} parameters")
    for divisor, vocabulary in [(8, True), (8, False), (4, True), (2, True), (1, True), (1, False)]:
        config = copy.deepcopy(meta.config)
        _shrink(config, divisor, vocabulary, set())
        try:
            with torch.device("meta"):
                if sum(parameter.numel() for parameter in type(meta)(copy.deepcopy(config)).parameters()) > MOST:
                    continue
            torch.manual_seed(0)
            model = type(meta)(config).eval()
            model.float()
            draw_weights(model)
            return Small(model, *_inputs_for(model, facts.get("inputs", {})), task)
        except Exception as error:
            failure = error
    raise failure


def _shrink(config: Any, divisor: int, vocabulary: bool, seen: set[int]) -> None:
    """Divide the widths of a configuration and of those inside it, and cut vocabularies short."""
    seen.add(id(config))
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            if id(value) not in seen:
                _shrink(value, divisor, vocabulary, seen)
        elif vocabulary and "vocab_size" in name and type(value) is int:
            _set(config, name, min(value, VOCABULARY))
        elif vocabulary and re.search(r"token_id|_id$|^image_token_index", name):
            _set(config, name, _small_id(value, name))
        elif EXPERTS.search(name) and type(value) is int:
            _set(config, name, min(value, 2 if "per_tok" in name or "top_k" in name else 8))
        elif WIDTH.search(name) and not NO_WIDTH.search(name):
            _set(config, name, _divided(value, divisor))
        elif name == "rope_parameters" and isinstance(value, dict) and isinstance(value.get("mrope_section"), list):
            value["mrope_section"] = _divided(value["mrope_section"], divisor)


def _set(config: Any, name: str, value: Any) -> None:
    if vars(config)[name] != value:  # not `getattr`: a value that differs by layer cannot be asked for
        setattr(config, name, value)


def _small_id(value: Any, name: str) -> Any:
    """Bring a token id into a short vocabulary, different names to different ids."""
    if isinstance(value, list):
        return [_small_id(one, name) for one in value]
    return 200 + sum(name.encode()) % 300 if type(value) is int and value >= VOCABULARY else value


def _divided(value: Any, divisor: int) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_divided(one, divisor) for one in value)
    return value // divisor if type(value) is int and value % divisor == 0 and value >= 2 * divisor else value


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Give a model weights under which every FFN contributes and no bias or norm is trivial."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point():
                continue
            if isinstance(module, nn.Embedding):
                parameter.normal_(std=0.5)
            elif name == "weight" and parameter.dim() > 1:
                parameter.normal_(std=0.7 / (parameter.numel() / parameter.shape[0]) ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def _inputs_for(model: Any, specified: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the first inputs that the forward accepts.

    Raises:
        Exception: what the forward raised on the first of them.
    """
    failure: Exception | None = None
    specified = specified or _patches(model)
    candidates: Iterator[dict[str, Any]] = iter([specified]) if specified else candidate_inputs(model)
    for candidate in candidates:
        inputs = {name: _drawn(value) for name, value in candidate.items()}
        try:
            with torch.no_grad():
                model(**inputs)
            return inputs, bool(specified)
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _patches(model: Any) -> dict[str, Any]:
    """Return the patches of one image, in a row, for towers that take them with the image's size in patches."""
    names, config = inspect.signature(model.forward).parameters, model.config
    if "grid_thw" not in names or not hasattr(config, "patch_size"):
        return {}
    patch = getattr(config, "temporal_patch_size", 1) * config.patch_size**2
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", 3)
    pixels = torch.empty(16, channels * patch, device="meta")
    name = "hidden_states" if "hidden_states" in names else "pixel_values"
    return {name: pixels, "grid_thw": torch.tensor([[1, 4, 4]])}


def _drawn(value: Any) -> Any:
    """Return random values of a shape and dtype."""
    if isinstance(value, dict):
        value = torch.empty(value["shape"], dtype=getattr(torch, value.get("dtype", "float32")), device="meta")
    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_meta:
        return value
    if value.dtype is torch.bool:
        return torch.zeros(value.shape, dtype=torch.bool)  # such masks say what is hidden
    return fill(value, torch.Generator().manual_seed(1), ids=range(5, 90))
