"""The MoE layers of any model, one description for all: those that moeify put there, and those of transformers.

transformers' layers are known by its conventions: a block with a `router` or a `gate`, and beside it `experts`, or
parts that count their experts. Shape legend: E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, nn

from moeify.contract.watch import Watch, choice_names
from moeify.layers import MoELayer
from moeify.layers.forward_record import ForwardRecord
from moeify.layers.quantized_experts import QuantizedExperts

_ROUTERS = ("router", "gate")
_TOP_K = ("top_k", "num_experts_per_tok", "top_k_experts", "moe_top_k")
_NAMED = re.compile(r"Top(\d+)Router$")  # Switch Transformers and NLLB have it in the name of the class alone
_SHARED = "shared"  # shared_expert, shared_experts, shared_expert_gate, shared_mlp


@dataclass(frozen=True)
class FoundLayer:
    """An MoE layer, found in a model.

    Attributes:
        path: Of the block that holds router and experts.
        router: What computes router logits.
        experts: The routed experts; more than one module where each projection is one.
        shared: What every token visits besides, with its gate.
        num_experts: E.
        top_k: Choices per token; None where nothing says it.
        hidden: H.
        intermediate: I of one routed expert.
        state: What knows the last forward pass and the capacity: the layer itself if it is moeify's, the hooks on it if
            it is transformers' and is watched, else None.
        config: Of the outermost model of transformers around it; None outside of one.
    """

    path: str
    router: nn.Module = field(repr=False)
    experts: tuple[nn.Module, ...] = field(repr=False)
    shared: tuple[nn.Module, ...] = field(repr=False)
    num_experts: int
    top_k: int | None
    hidden: int
    intermediate: int
    state: MoELayer | Watch | None = field(default=None, repr=False)
    config: Any = field(default=None, repr=False)

    @property
    def record(self) -> ForwardRecord | None:
        """Return what the last forward pass computed; None if nothing ran, or nobody looked."""
        return None if self.state is None else self.state.record

    def losses(self) -> dict[str, Tensor]:
        """Return the losses of the last forward pass, without their coefficients."""
        return {} if self.state is None else self.state.losses()

    @property
    def kind(self) -> str:
        """Return what the router is called: moeify's word, or the name of transformers' class."""
        if isinstance(self.state, MoELayer):
            return self.state.config.router.name
        return type(self.router).__name__

    @property
    def shared_intermediate(self) -> int:
        """Return the sum of the intermediate sizes of the shared experts; 0 without any."""
        sizes = (_smallest_matrix(module) // self.hidden for module in self.shared)
        count = self.state.config.shared_experts if isinstance(self.state, MoELayer) else 1
        return count * sum(size for size in sizes if size > 1)  # a gate has one row

    @property
    def capacity_obstacle(self) -> str | None:
        """Return why no capacity can be set; None if one can."""
        if isinstance(self.state, MoELayer):
            return None
        if hasattr(self.router, "expert_capacity"):
            return f"{self.path}: its router keeps a capacity of its own, in tokens: set its expert_capacity"
        if choice_names(self.experts[0]) is None:
            kind = type(self.experts[0]).__name__
            return f"{self.path}: {kind} is not told who chose what: convert a dense model with capacity_factor instead"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, the form of `inspect --json`."""
        return {
            "name": self.path,
            "router": self.kind,
            "experts": self.num_experts,
            "top_k": self.top_k,
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "shared_intermediate": self.shared_intermediate,
            "count_params": sum(p.numel() for name in ("routers", "experts") for p in self.part(name)),
            "capacity_obstacle": self.capacity_obstacle,
        }

    def part(self, name: str) -> Iterator[nn.Parameter]:
        """Return the parameters of its "routers" or of its "experts", shared ones among them."""
        modules = (self.router,) if name == "routers" else (*self.experts, *self.shared)
        for module in modules:
            yield from module.parameters()


def find_layers(model: nn.Module) -> dict[str, FoundLayer]:
    """Return the MoE layers inside a model, by their paths, in the order of its modules; it may be wrapped."""
    found: dict[str, FoundLayer] = {}
    config: Any = None
    for path, module in model.named_modules():
        config = config or text_config(module)  # the outermost: T5's stacks have copies
        if isinstance(module, MoELayer):
            found[path] = _ours(path, module, config)
        elif (router := _router_in(module)) is not None:
            found[path] = _stock(path, model, module, router, config)
    return found


def _ours(path: str, layer: MoELayer, config: Any) -> FoundLayer:
    settings, shared = layer.config, layer.shared_expert
    hidden = getattr(layer.experts, "hidden_dim", 0) or _columns(layer.router)
    return FoundLayer(
        path=path,
        router=layer.router,
        experts=(layer.experts,),
        shared=() if shared is None else (shared,),
        num_experts=settings.experts,
        top_k=settings.top_k,
        hidden=hidden,
        intermediate=_intermediate(layer.experts, settings.experts, hidden),
        state=layer,
        config=config,
    )


def _router_in(block: nn.Module) -> nn.Module | None:
    """Return the router of a block that has experts beside it."""
    children = dict(block.named_children())
    router = next((children[name] for name in _ROUTERS if name in children), None)
    if router is None or not _experts_in(block) or not any(True for _ in router.parameters()):
        return None
    return router


def _experts_in(block: nn.Module) -> tuple[nn.Module, ...]:
    children = dict(block.named_children())
    if "experts" in children:
        return (children["experts"],)
    return tuple(child for name, child in children.items() if name not in _ROUTERS and hasattr(child, "num_experts"))


def _stock(path: str, model: nn.Module, block: nn.Module, router: nn.Module, config: Any) -> FoundLayer:
    experts = _experts_in(block)
    count = _number((router, *experts, block), ("num_experts", "n_routed_experts")) or _rows(router)
    hidden = _number((*experts, router), ("hidden_dim", "hidden_size", "input_size")) or _columns(router)
    top_k = _number((router, block), _TOP_K) or _named_top_k(router)
    return FoundLayer(
        path=path,
        router=router,
        experts=experts,
        shared=tuple(_shared_beside(model, path, block)),
        num_experts=count,
        top_k=top_k or _number((config,), _TOP_K),
        hidden=hidden,
        intermediate=min(_intermediate(part, count, hidden) for part in experts),
        state=Watch.on(router),
        config=config,
    )


def _shared_beside(model: nn.Module, path: str, block: nn.Module) -> Iterator[nn.Module]:
    """Return what is shared in a block, or, where it holds nothing but experts (Granite), beside it."""
    inside = [child for name, child in block.named_children() if name.startswith(_SHARED)]
    if not inside and path:
        around = model.get_submodule(path.rpartition(".")[0])
        inside = [child for name, child in around.named_children() if name.startswith(_SHARED)]
    yield from (child for child in inside if any(True for _ in child.parameters()))


def text_config(module: object) -> Any:
    """Return the config of a model of transformers, that of its text where it has parts; None of anything else."""
    text = getattr(getattr(module, "config", None), "get_text_config", None)
    return None if text is None else text()


def _number(holders: tuple[Any, ...], names: tuple[str, ...]) -> int | None:
    """Return the first number of one of these names, in the holders, what PEFT wraps in them, or their configs."""
    for holder in holders:
        inner = list(holder.modules()) if isinstance(holder, nn.Module) else [holder]
        for place in (*inner, *(getattr(module, "config", None) for module in inner)):
            for name in names:
                value = getattr(place, name, None)
                if isinstance(value, int) and value > 0:
                    return value
    return None


def _named_top_k(router: nn.Module) -> int | None:
    found = _NAMED.search(type(router).__name__)
    return int(found[1]) if found else None


def _rows(router: nn.Module) -> int:
    return min(p.shape[0] for p in router.parameters() if p.dim() > 1)


def _columns(router: nn.Module) -> int:
    return max(p.shape[-1] for p in router.parameters() if p.dim() > 1)


def _intermediate(part: nn.Module, experts: int, hidden: int) -> int:
    """Return I; quantized weights hold fewer numbers than they have, and say it."""
    if isinstance(part, QuantizedExperts):
        return int(part.intermediate_dim)
    return _smallest_matrix(part, experts) // hidden


def _smallest_matrix(module: nn.Module, experts: int = 1) -> int:
    """Return how many weights the smallest projection of one expert has: H·I; biases are told by their dimensions."""
    shapes = [tuple(p.shape) for p in module.parameters()]
    deepest = max((len(shape) for shape in shapes), default=0)
    sizes = [prod(shape[-2:]) for shape in shapes if len(shape) == deepest > 1]
    below_one_another = deepest == 2 and len(sizes) < experts  # DBRX stacks its experts in rows
    return min(sizes, default=0) // (experts if below_one_another else 1)
