"""The tensors of a new MoE layer, each described once: name, shape, and where its values come from.

The appliers, the optimizer's state and the cost read this description, and none of them knows a name or a shape itself.

Copies (sparse upcycling, Komatsuzaki et al. 2022, arXiv:2212.05055): with weights that sum to 1 the layer computes
Σ_k w_k·FFN(x) = FFN(x), whatever the router: exact at step 0.

Granularity G (He et al. 2024, arXiv:2410.07524): the FFN is cut along its intermediate size into G shards, whose
outputs add up to the FFN's; expert e holds shard e mod G. Routers start with equal rows for the G experts of a group,
so whole groups are chosen, each expert with weight w/G: multiplying the down projections by G makes the sum exact. (The
paper multiplies all three projections of a GLU by a cube root, which is not exact: silu(c·g) ≠ c·silu(g).)

Shared experts see every token: shared expert n holds shard n mod G. A shard that n shared experts hold is computed
n + 1 times, once of it by the routed experts: each time counts 1/(n + 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product
from typing import TypeAlias

import torch
from torch import Tensor, nn

from moeify.config import MoEConfig
from moeify.families.base import Config, ExpertWeight, Held, SharedWeight, layer_count, layer_number, random_rows
from moeify.families.table import FAMILIES
from moeify.families.words import MOEIFY
from moeify.plan import Plan, Rows, Site
from moeify.routers.base import StartValue

Read: TypeAlias = Callable[[str], Tensor]  # returns a dense parameter or buffer by its name, as the model stores it


@dataclass(frozen=True)
class Block:
    """The part of one dense tensor that one expert holds.

    Attributes:
        source: Name of the dense tensor; None for zeros, where the dense FFN lacks a bias beside one that it has.
        rows: Output rows.
        columns: Start and stop of the inputs; None for a bias, which has none.
        scale: What the values are multiplied by.
        change: How the method changes the values before that; None if it does not.
    """

    source: str | None
    rows: Rows
    columns: tuple[int, int] | None
    scale: float = 1.0
    change: Callable[[Tensor], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values: (out, in), or (out,) for a bias."""
        return (self.rows.count, *([] if self.columns is None else [self.columns[1] - self.columns[0]]))

    def value(self, read: Read) -> Tensor:
        """Return the values that the expert starts with."""
        if self.source is None:
            return torch.zeros(self.shape)
        value = read(self.source)
        if self.columns is not None:
            value = value.flatten(1)  # a 1x1 convolution's weight has dimensions of size 1
            value = (value.t() if self.rows.transposed else value)[:, slice(*self.columns)]
        value = value[self.rows.start : self.rows.stop : self.rows.step]
        value = value if self.change is None else self.change(value)
        return value if self.scale == 1 else value * self.scale


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # in every source of a native family
Expert: TypeAlias = dict[str, tuple[Block, ...]]  # the blocks of one expert, by the names of the stacked tensors


@dataclass(frozen=True)
class LayerTensor:
    """One tensor of a new layer: blocks of the dense FFN, or a start value, or a dense tensor as it is.

    Attributes:
        name: Name in the state dict of the layer, or on disk.
        shape: Its shape; () for one that is copied.
        blocks: Parts of the dense FFN, expert after expert, laid one after the other along the output rows.
        routed: Each token meets only top_k of the experts that the blocks belong to.
        start: How a tensor is computed that the dense model lacks.
        copied: Name of the dense parameter or buffer that it equals, which a custom activation reads.
        axis: What the blocks follow each other along: 0 for the output rows, 1 for the inputs.
        turned: What is stored of one expert's blocks, one below the other; None for themselves.
    """

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...] = ()
    routed: bool = False
    start: StartValue | None = None
    copied: str | None = None
    axis: int = 0
    turned: Callable[[Tensor], Tensor] | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the dense parameters that it replaces."""
        return (self.copied,) if self.copied else tuple(dict.fromkeys(b.source for b in self.blocks if b.source))

    def unchanged(self) -> LayerTensor:
        """Return the description of the plain dense values: cut, and neither changed nor scaled."""
        return replace(self, blocks=tuple(replace(block, scale=1.0, change=None) for block in self.blocks))

    def fill(self, tensor: Tensor, read: Read) -> None:
        """Write the values into a tensor of this shape."""
        if self.start is not None:
            tensor.copy_(self.start.build())
        elif self.copied is not None:
            tensor.copy_(read(self.copied))
        else:
            flat = tensor if self.axis else tensor.view(-1, *self.blocks[0].shape[1:])
            parts = torch.split(flat, [block.shape[self.axis] for block in self.blocks], self.axis)
            for part, block in zip(parts, self.blocks, strict=True):
                part.copy_(block.value(read))


def layer_tensors(site: Site, config: MoEConfig) -> Iterator[LayerTensor]:
    """Describe the tensors of the layer at a site, by their names in its state dict."""
    for name, start in config.router.start(config, site.hidden, site.path).items():
        yield LayerTensor(f"router.{name}", start.shape, start=start)
    stacks = {"experts": config.experts, **({"shared_expert": config.shared_experts} if config.shared_experts else {})}
    for stack, count in stacks.items():
        experts = [_expert(site, config, stack, number) for number in range(count)]
        for name in experts[0]:
            yield _stacked(f"{stack}.{name}", [expert[name] for expert in experts], routed=stack == "experts")
    for stack in stacks:
        for dense, own in site.activation_state:
            yield LayerTensor(f"{stack}.region.{own}", (), copied=dense)


def stored_tensors(plan: Plan, site: Site, held: Mapping[str, Held] | None = None) -> Iterator[LayerTensor]:
    """Describe the tensors that a checkpoint of the plan's target holds for a site, in order, by names on disk.

    Args:
        plan: What is converted.
        site: One of its sites.
        held: What the tensors of a native target's layers hold; None for what they hold in its safetensors files.
    """
    if plan.target != MOEIFY:
        return _native_tensors(plan, site, held or FAMILIES[plan.target].tensors)
    return (replace(tensor, name=f"{site.path}.{tensor.name}") for tensor in layer_tensors(site, plan.config))


def _native_tensors(plan: Plan, site: Site, held: Mapping[str, Held]) -> Iterator[LayerTensor]:
    config = plan.config
    experts = [_expert(site, config, "experts", number) for number in range(config.experts)]
    for apart, keys in groupby(held, key=lambda key: "{expert}" in key):
        for number, key in product(range(config.experts) if apart else [None], list(keys)):
            name, weight = key.format(layer=layer_number(site), expert=number), held[key]
            if isinstance(weight, SharedWeight):
                yield from _shared(name, weight, site, config)
                continue
            if not isinstance(weight, ExpertWeight):
                start = weight(name, site, config)
                yield LayerTensor(name, start.shape, start=start)
                continue
            some = experts if number is None else experts[number : number + 1]
            stacked = _stacked(name, [expert[weight.stack][weight.blocks] for expert in some], routed=True)
            if weight.turned is not None:
                one = weight.turned(torch.empty(stacked.shape[1:], device="meta"))
                stacked = replace(stacked, shape=(len(some), *one.shape), turned=weight.turned)
            yield stacked if number is None else replace(stacked, shape=stacked.shape[1:])


def extra_tensors(plan: Plan, dense: Config, names: Iterable[str]) -> Iterator[LayerTensor]:
    """Describe the tensors that a native target has besides those of its MoE layers, and the dense model has not.

    Args:
        plan: What is converted.
        dense: The dense config, defaults filled in.
        names: The tensors that are stored of the dense model.
    """
    if plan.target == MOEIFY:
        return
    family = FAMILIES[plan.target]
    if family.untied and dense.get("tie_word_embeddings") and HEAD not in names:
        yield LayerTensor(HEAD, (), copied=EMBEDDING)
    for key, build in family.sources[plan.model_type].added.items():
        value = partial(build, dense)
        shape = tuple(value().shape)
        for layer in range(layer_count(dense) if "{layer}" in key else 1):
            if (name := key.format(layer=layer)) not in names:
                yield LayerTensor(name, shape, start=StartValue(shape, None, value, short=True))


def _shared(name: str, held: SharedWeight, site: Site, config: MoEConfig) -> Iterator[LayerTensor]:
    """Describe a weight of the shared experts as one wide FFN, or of an idle one in their place."""
    weight, axis = held.weight, int(held.weight.stack == "down_proj")
    if config.shared_experts:
        shared = [_expert(site, config, "shared_expert", number) for number in range(config.shared_experts)]
        held_by = [expert[weight.stack][weight.blocks] for expert in shared]
        blocks = tuple(block for row in zip(*held_by, strict=True) for block in row)  # all gates, then all ups
        if axis:
            blocks = tuple(replace(block, scale=block.scale * held.scale) for block in blocks)
        shape = list(blocks[0].shape)
        shape[axis] = sum(block.shape[axis] for block in blocks)
        yield LayerTensor(name, tuple(shape), blocks, axis=axis)
    elif held.idle is not None:
        width = held.idle or site.intermediate // config.granularity
        zeros = StartValue((site.hidden, width), None, lambda: torch.zeros(site.hidden, width), short=True)
        start = zeros if axis else random_rows(len(site.ups[weight.blocks]) * width)(name, site, config)
        yield LayerTensor(name, start.shape, start=start)


def _stacked(name: str, experts: list[tuple[Block, ...]], *, routed: bool) -> LayerTensor:
    rows = sum(block.shape[0] for block in experts[0])
    shape = (len(experts), rows, *experts[0][0].shape[1:])
    return LayerTensor(name, shape, tuple(block for blocks in experts for block in blocks), routed)


def _expert(site: Site, config: MoEConfig, stack: str, number: int) -> Expert:
    """Return what one expert holds; shared experts are unchanged whatever the method."""
    shards, width, routed = config.granularity, site.intermediate // config.granularity, stack == "experts"
    shard = number % shards
    holders = len(range(shard, config.shared_experts, shards))  # shared experts that hold the same shard
    seed, name = config.seed, f"{site.path}.{stack}.{number}"

    def change(which: str, axis: int) -> Callable[[Tensor], Tensor] | None:
        changed = partial(config.method.changed, axis=axis, seed=seed, expert=name, which=which)
        return changed if routed and not config.method.exact else None

    ups, down = [rows.shard(shard, shards) for rows in site.ups], site.down
    columns, scale = (shard * width, (shard + 1) * width), (shards if routed else 1) / (1 + holders)
    found = {
        site.up_name: tuple(
            Block(rows.parameter, rows, (0, site.hidden), 1.0, change(f"up{i}", 0)) for i, rows in enumerate(ups)
        ),
        "down_proj": (Block(down.parameter, down, columns, scale, change("down", 1)),),
    }
    if site.up_bias:
        found[f"{site.up_name}_bias"] = tuple(Block(rows.bias, rows, None) for rows in ups)
    if down.bias:
        found["down_proj_bias"] = (Block(down.bias, down, None, 1 / (1 + config.shared_experts)),)
    return found


@torch.no_grad()
def fill_layer(layer: nn.Module, tensors: Iterable[LayerTensor], read: Read) -> None:
    """Give a layer of zeros the values that `layer_tensors` describes; `read` returns the dense ones."""
    held = dict([*layer.named_parameters(), *layer.named_buffers()])
    for tensor in tensors:
        tensor.fill(held[tensor.name], read)
