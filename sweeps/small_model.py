"""A small model of a registered type with weights that make every part matter, and inputs that it accepts."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import nn

from moeify.measure import fill
from moeify.tracing.inputs import candidate_inputs
from sweeps.models import build, example_inputs, looked_up, model_types, set_fields

# Widths are divided by one number each, which keeps the ratios between them that a model relies on.
WIDTH = re.compile(
    r"dim|size|width|^d_|d_head|n_embd|n_inner|hidden|rank|channels|channel_list|features|expand"
    r"|num_filters|num_pos_feats|upsample_groups"
)
NO_WIDTH = re.compile(
    r"vocab|image|patch|kernel|window|position|seq|length|chunk|block_size|batch|crop|(?<!up)sample|max_|codebook_size"
    r"|^num_(?!features|filters|pos_feats)|(?<!upsample_)group|stride|bins|mel|layers|buckets|num_channels|in_channels"
    r"|text_config|temporal|downsample|d_conv|grid|factor"
)
PICTURE = re.compile(r"image_size|img_size|image_embedding_size|feature_sizes|num_frames")
LARGE = {"image_size": 512, "img_size": 512, "num_frames": 16}  # smaller ones stay
EXPERTS = re.compile(
    r"^(num|n|moe_num)_(local_|routed_)?experts$|^zero_expert_num$|num_experts_per_tok$|^top_k_experts$|^moe_topk$"
)
MOST = 150_000_000  # parameters
VOCABULARY = 512


@dataclass(frozen=True)
class Small:
    """A model in evaluation mode, inputs that it accepts, and whether it converts only with inputs given."""

    model: Any
    inputs: dict[str, Any]
    needs_inputs: bool

    @property
    def example_inputs(self) -> dict[str, Any] | None:
        """What a caller of the library would have to pass."""
        return self.inputs if self.needs_inputs else None

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(parameter.numel() for parameter in self.model.parameters())


class Reduction(NamedTuple):
    """How much smaller a configuration gets.

    Attributes:
        divisor: What widths are divided by.
        vocabulary: Whether vocabularies are cut short.
        pictures: What large pictures are divided by.
    """

    divisor: int
    vocabulary: bool
    pictures: int

    def of(self, name: str, value: Any) -> Any:
        """Return a smaller value for a field."""
        if self.vocabulary and "vocab_size" in name and type(value) is int:
            return min(value, VOCABULARY)
        if self.vocabulary and re.search(r"token_id|_id$|^image_token_index", name):
            return _small_id(value, name)
        if name == "use_cache":
            return False  # caches are outputs that torch.export does not know
        if EXPERTS.search(name) and type(value) is int:
            return min(value, 2 if re.search("per_tok|top_?k", name) else 8)
        if PICTURE.search(name):
            large = max(value, default=0) if isinstance(value, list | tuple) else value
            return value if name in LARGE and large < LARGE[name] else _divided(value, self.pictures)
        if WIDTH.search(name) and not NO_WIDTH.search(name):
            return _divided(value, self.divisor)
        sections = value.get("mrope_section") if name == "rope_parameters" and isinstance(value, dict) else None
        if isinstance(sections, list) and all(type(each) is int for each in sections):  # others name axes
            return {**value, "mrope_section": _divided_sections(sections, self.divisor)}
        return value


REDUCTIONS = (
    Reduction(8, vocabulary=True, pictures=4),
    Reduction(8, vocabulary=True, pictures=1),
    Reduction(8, vocabulary=False, pictures=1),
    Reduction(4, vocabulary=True, pictures=4),
    Reduction(2, vocabulary=True, pictures=4),
    Reduction(1, vocabulary=True, pictures=4),
    Reduction(1, vocabulary=True, pictures=1),
    Reduction(1, vocabulary=False, pictures=1),
)


def small_model(model_type: str) -> Small:
    """Return the smallest form of a model type that can be built and run.

    Raises:
        Exception: what stopped the first attempt.
    """
    task, facts = model_types()[model_type], looked_up(model_type)
    meta = build(model_type, task, facts.get("config", {}))
    _name_sections(meta)
    failure: Exception | None = None
    for reduction in REDUCTIONS:
        config = copy.deepcopy(meta.config)
        _shrink(config, reduction, set())
        set_fields(config, facts.get("small config", {}))
        try:
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in type(meta)(copy.deepcopy(config)).parameters())
            if count > MOST:
                raise ValueError(f"{count} parameters are more than {MOST}")
            torch.manual_seed(0)
            model = runnable(type(meta)(config).eval())
            model.float()
            draw_weights(model)
            return Small(model, _inputs_for(model, facts), "inputs" in facts)
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise failure


def runnable(model: Any) -> Any:
    """Return a model, or the first model inside one that has no forward, or one for a session of a video."""
    if type(model).forward is not nn.Module.forward and "inference_session" not in _arguments(model):
        return model
    inside = (inner for inner in model.modules() if isinstance(inner, transformers.PreTrainedModel))
    return runnable(next(inner for inner in inside if inner is not model))


def _arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _name_sections(model: nn.Module) -> None:
    """Write the sections of a multimodal RoPE, which are widths, into a configuration that leaves them to the code."""
    for module in model.modules():
        sections, config = getattr(module, "mrope_section", None), cast("Any", getattr(module, "config", None))
        if sections and isinstance(getattr(config, "rope_parameters", None), dict):
            config.rope_parameters.setdefault("mrope_section", list(sections))


def _shrink(config: Any, reduction: Reduction, seen: set[int]) -> None:
    """Reduce the fields of a configuration and of those inside it."""
    seen.add(id(config))
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            if id(value) not in seen:
                _shrink(value, reduction, seen)
        elif name == "_heterogeneity_spec":
            layers = value.per_layer_overrides.items()
            config.per_layer_config = {n: {key: reduction.of(key, one) for key, one in of.items()} for n, of in layers}
        elif (reduced := reduction.of(name, value)) != value:
            setattr(config, name, reduced)


def _small_id(value: Any, name: str) -> Any:
    """Bring a token id into a short vocabulary, different names to different ids."""
    if isinstance(value, list):
        return [_small_id(one, name) for one in value]
    return 200 + sum(name.encode()) % 300 if type(value) is int and value >= VOCABULARY else value


def _divided(value: Any, divisor: int) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_divided(one, divisor) for one in value)
    return value // divisor if type(value) is int and value % divisor == 0 and value >= 2 * divisor else value


def _divided_sections(sections: list[int], divisor: int) -> list[int]:
    """Divide where each section ends, so that their sum is divided whatever they are."""
    ends = [end // divisor for end in accumulate(sections, initial=0)]
    return [end - start for start, end in pairwise(ends)]


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Give a model weights under which every FFN contributes and no bias or norm is trivial."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point():
                continue
            if isinstance(module, nn.Embedding):
                parameter.normal_(std=0.5)
                if module.padding_idx is not None:  # torch never trains this row, and some models zero it when loaded
                    parameter[module.padding_idx] = 0
            elif name == "weight" and parameter.dim() > 1:
                parameter.normal_(std=0.7 / (prod(parameter.shape[1:]) or 1) ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def _inputs_for(model: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the first inputs that the forward accepts.

    Raises:
        Exception: what the forward raised on the first of them.
    """
    failure: Exception | None = None
    specified = facts.get("small inputs") or facts.get("inputs")
    candidates = [example_inputs(specified, model.config)] if specified else list(_patches(model))
    for candidate in candidates or candidate_inputs(model):
        inputs = {name: _drawn(name, value) for name, value in candidate.items()}
        try:
            with torch.no_grad():
                model(**inputs)
            return inputs
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _patches(model: Any) -> Iterator[dict[str, Any]]:
    """Yield the patches of one image, in a row, for towers that take them with the image's size in patches."""
    names, config = _arguments(model), model.config
    grid = next((name for name in ("grid_thw", "image_grid_thw") if name in names), "")
    if not grid or not isinstance(getattr(config, "patch_size", None), int):
        return
    beside = {grid: torch.tensor([[1, 4, 4]])} | ({"merge_sizes": torch.tensor([2])} if "merge_sizes" in names else {})
    frames: Any = getattr(config, "temporal_patch_size", None) or getattr(config, "patch_temporal", 1)
    channels: Any = getattr(config, "in_channels", None) or getattr(config, "num_channels", 3)
    name = "hidden_states" if "hidden_states" in names else "pixel_values"
    side = config.patch_size
    for shape in [(16, channels * frames * side**2), (16, channels, side, side)]:
        yield {name: torch.empty(shape, device="meta"), **beside}


def _drawn(name: str, value: Any) -> Any:
    """Return random values of a shape and dtype."""
    if isinstance(value, dict):
        return {inner: _drawn(inner, held) for inner, held in value.items()}
    if isinstance(value, list):
        return [_drawn(name, held) for held in value]
    if not isinstance(value, torch.Tensor) or not value.is_meta:
        return value
    if value.dtype is torch.bool:
        return torch.zeros(value.shape, dtype=torch.bool)  # such masks say what is hidden
    drawn = fill(value, torch.Generator().manual_seed(1), name=name, ids=range(5, 30))
    return drawn.sort(-1).values if name == "bbox" else drawn  # left and top come before right and bottom
