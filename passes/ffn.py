"""What is found in a graph, as data: the FFNs, and what looks like one and is not."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import fx

from moeify.passes.matching.activation import GateUpRows
from moeify.passes.matching.cut import Cut
from moeify.passes.matching.projection import Projection
from moeify.passes.matching.region import region_parameters

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Call:
    """One place in a graph where an FFN is computed.

    Attributes:
        ups: The projections that read the input.
        down: The down projection.
        nodes: What is computed between them, in the graph's order.
        cuts: Which of that takes the features apart.
    """

    ups: tuple[Projection, ...]
    down: Projection
    nodes: tuple[fx.Node, ...] = field(repr=False)
    cuts: tuple[Cut, ...] = field(default=(), repr=False)

    @property
    def kind(self) -> str:
        """Return "glu" where more is projected up than down, and "mlp" otherwise."""
        return "glu" if sum(up.out_features for up in self.ups) > self.down.in_features else "mlp"

    @property
    def source(self) -> fx.Node:
        """The activation that the FFN reads."""
        return self.ups[0].source

    @property
    def inside(self) -> tuple[fx.Node, ...]:
        """All its nodes: projections, the biases added to them, and what is computed between them."""
        return (*(node for p in (*self.ups, self.down) for node in (p.product, p.node)), *self.nodes)


@dataclass(frozen=True)
class FFN:
    """A dense FFN in a traced graph.

    Attributes:
        name: Path of the innermost module that contains all of it.
        kind: "glu" (gate and up projections) or "mlp".
        activation: Canonical name, or "custom".
        hidden: The hidden size.
        intermediate: The intermediate size.
        gate_up_rows: Which rows of the projections are gate and up; None for a custom activation.
        region: What is computed between the projections, as a graph of its own: `region(*ups) → input of down`.
        calls: Where the model computes it, in order: more than one where layers share it.
        shared_expert: It stands beside routed experts in an MoE layer that the model already has.
        rounded: It has the name of its activation up to rounding to float32 only.
    """

    name: str
    kind: str
    activation: str
    hidden: int
    intermediate: int
    gate_up_rows: GateUpRows | None
    region: fx.GraphModule = field(repr=False, compare=False)
    calls: tuple[Call, ...]
    shared_expert: bool = False
    rounded: bool = False

    @property
    def ups(self) -> tuple[Projection, ...]:
        """The projections that read the input, in the first call."""
        return self.calls[0].ups

    @property
    def down(self) -> Projection:
        """The down projection, in the first call."""
        return self.calls[0].down

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """What is computed between the projections, in the first call."""
        return self.calls[0].nodes

    @property
    def projected(self) -> tuple[str, ...]:
        """Names of its weights and biases."""
        names = [name for p in (*self.ups, self.down) for name in (p.weight, p.bias) if name]
        return tuple(dict.fromkeys(names))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of its weights and biases, and of the parameters inside the region."""
        return tuple(dict.fromkeys([*self.projected, *region_parameters(self.region)]))


@dataclass(frozen=True)
class Refusal:
    """Something that looks like an FFN and is not.

    Attributes:
        name: Path of the module that would be the down projection.
        reason: Why not.
        node: The node of the graph at which the match stopped.
        where: Path of the module that issued that node.
    """

    name: str
    reason: str
    node: str
    where: str = ""


@dataclass(frozen=True)
class Inspection:
    """What `FindFFN` found, in the order of execution.

    Attributes:
        ffns: The FFNs.
        refused: What looks like one and is not. When there is no FFN at all: every projection that was looked at.
    """

    ffns: tuple[FFN, ...]
    refused: tuple[Refusal, ...]

    def reasons(self) -> dict[str, list[str]]:
        """Return the names of what was refused for each reason, without the numbers that tell equal nodes apart.

        Parts of attentions, which every transformer has, come last.
        """
        alike: dict[str, tuple[str, list[str]]] = {}
        for refusal in self.refused:
            reason = re.sub(r"`([^`]*?)_\d+`", r"`\1`", refusal.reason)
            alike.setdefault(re.sub(r"\d+", "", reason), (reason, []))[1].append(refusal.name)
        return dict(sorted(alike.values(), key=lambda found: bool(_ATTENTION.search(" ".join((found[0], *found[1]))))))
