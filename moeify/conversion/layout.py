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

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from moeify.config import MoEConfig
from moeify.plan import Rows, Site
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
    change: Change | None = None

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


@dataclass(frozen=True)
class Change:
    """What the method of a conversion does to one weight of one expert.

    Attributes:
        config: The settings.
        expert: The expert's name in the model; its random numbers depend on this and the seed.
        weight: Name of the weight in the expert.
        axis: The axis of the weight that runs over the intermediate size.
    """

    config: MoEConfig
    expert: str
    weight: str
    axis: int

    def __call__(self, value: Tensor) -> Tensor:
        """Return the changed weight."""
        return self.config.method.changed(value, self.axis, self.config.seed, self.expert, self.weight)


@dataclass(frozen=True)
class StackedTensor:
    """Weights or biases of experts: blocks of the dense FFN, laid one after the other along the output rows.

    Attributes:
        name: Name in the state dict of the layer.
        shape: (experts, …), or without the first dimension for a single expert.
        blocks: The blocks of the first expert, then of the second, and so on.
        routed: Each token meets only some of these experts.
    """

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    routed: bool

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the dense parameters that it replaces."""
        return tuple(dict.fromkeys(block.source for block in self.blocks if block.source))

    def unchanged(self) -> StackedTensor:
        """Return the description of the plain dense values: cut, and neither changed nor scaled."""
        return replace(self, blocks=tuple(replace(block, scale=1.0, change=None) for block in self.blocks))

    def fill(self, tensor: Tensor, read: Read) -> None:
        """Write the values into a tensor of this shape."""
        parts = torch.split(tensor.view(-1, *self.blocks[0].shape[1:]), [block.shape[0] for block in self.blocks])
        for part, block in zip(parts, self.blocks, strict=True):
            part.copy_(block.value(read))


@dataclass(frozen=True)
class StartTensor:
    """A tensor of a router, or one that a native format adds: computed from the seed and its name.

    Attributes:
        name: Name in the state dict of the layer.
        start: Shape, dtype and values.
        sources: No dense parameters.
    """

    name: str
    start: StartValue
    sources: ClassVar[tuple[str, ...]] = ()

    def fill(self, tensor: Tensor, read: Read) -> None:
        """Write the values into a tensor of this shape."""
        tensor.copy_(self.start.build())


@dataclass(frozen=True)
class CopiedTensor:
    """A parameter or buffer that a custom activation reads; all experts of a stack share it.

    Attributes:
        name: Name in the state dict of the layer.
        source: Name in the dense model.
    """

    name: str
    source: str

    @property
    def sources(self) -> tuple[str, ...]:
        """The name in the dense model."""
        return (self.source,)

    def fill(self, tensor: Tensor, read: Read) -> None:
        """Write the values into a tensor of this shape."""
        tensor.copy_(read(self.source))


LayerTensor: TypeAlias = StackedTensor | StartTensor | CopiedTensor


def layer_tensors(site: Site, config: MoEConfig) -> Iterator[LayerTensor]:
    """Describe the tensors of the layer at a site, by their names in its state dict."""
    for name, start in config.router.start(config, site.hidden, site.path).items():
        yield StartTensor(f"router.{name}", start)
    routed = routed_experts(site, config)
    yield from (stacked(f"experts.{name}", [expert[name] for expert in routed], routed=True) for name in routed[0])
    shared = [_expert(site, config, f"shared_expert.{n}", n, routed=False) for n in range(config.shared_experts)]
    for name in shared[0] if shared else ():
        yield stacked(f"shared_expert.{name}", [expert[name] for expert in shared], routed=False)
    for stack in ("experts", *(["shared_expert"] if shared else [])):
        yield from (CopiedTensor(f"{stack}.region.{own}", dense) for dense, own in site.activation_state)


def routed_experts(site: Site, config: MoEConfig) -> list[dict[str, tuple[Block, ...]]]:
    """Return the blocks of each routed expert, by the names of the stacked tensors."""
    return [_expert(site, config, f"experts.{n}", n, routed=True) for n in range(config.experts)]


def stacked(name: str, experts: list[tuple[Block, ...]], *, routed: bool) -> StackedTensor:
    """Describe the stack of one tensor of several experts."""
    rows = sum(block.shape[0] for block in experts[0])
    shape = (len(experts), rows, *experts[0][0].shape[1:])
    return StackedTensor(name, shape, tuple(block for blocks in experts for block in blocks), routed)


def _expert(site: Site, config: MoEConfig, name: str, number: int, *, routed: bool) -> dict[str, tuple[Block, ...]]:
    """Return the blocks of one expert; shared experts are unchanged whatever the method."""
    shards, width = config.granularity, site.intermediate // config.granularity
    shard = number % shards
    holders = len(range(shard, config.shared_experts, shards))  # shared experts that hold the same shard
    scale = (shards if routed else 1) / (1 + holders)
    ups = [rows.shard(shard, shards) for rows in site.ups]
    change = partial(Change, config, f"{site.path}.{name}") if routed and not config.method.exact else lambda *_: None

    def up(number: int, rows: Rows) -> Block:
        return Block(rows.parameter, rows, (0, site.hidden), change=change(f"up{number}", 0))

    down, columns = site.down, (shard * width, (shard + 1) * width)
    blocks = {
        site.up_name: tuple(up(number, rows) for number, rows in enumerate(ups)),
        "down_proj": (Block(down.parameter, down, columns, scale, change("down", 1)),),
    }
    if site.up_bias:
        blocks[f"{site.up_name}_bias"] = tuple(Block(rows.bias, rows, None) for rows in ups)
    if down.bias:
        blocks["down_proj_bias"] = (Block(down.bias, down, None, 1 / (1 + config.shared_experts)),)
    return blocks


@torch.no_grad()
def fill_layer(layer: nn.Module, tensors: Iterable[LayerTensor], read: Read) -> None:
    """Give a layer the values that it starts with.

    Args:
        layer: A layer with zero weights.
        tensors: What `layer_tensors` says of it.
        read: Returns a dense parameter or buffer by its name.
    """
    held = dict([*layer.named_parameters(), *layer.named_buffers()])
    for tensor in tensors:
        tensor.fill(held[tensor.name], read)
