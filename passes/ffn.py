"""What is found in a graph, as data: the FFNs, and what looks like one and is not."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from moeify.passes.activation import Halves, learned
from moeify.passes.projection import Projection


@dataclass(frozen=True)
class FFN:
    """A dense FFN in a traced graph.

    Attributes:
        name: Path of the innermost module that contains all of it.
        kind: "glu" (gate and up projections) or "mlp".
        activation: Canonical name, or "custom".
        hidden: Width read and written.
        intermediate: Width between the projections.
        ups: The projections that read the input.
        down: The projection back.
        halves: Which projection rows are gate and up; None for a custom activation.
        region: The row-wise computation between them as a graph of its own: `region(*ups) → input of down`.
        nodes: The region's nodes in the model's graph.
        neuron_wise: Each neuron of the region depends on that neuron alone (no norm inside): the FFN may be split.
        calls: How often the model applies it (above 1 when layers share it).
        shared_expert: It stands beside routed experts in an MoE layer that the model already has.
    """

    name: str
    kind: str
    activation: str
    hidden: int
    intermediate: int
    ups: tuple[Projection, ...]
    down: Projection
    halves: Halves | None
    region: fx.GraphModule = field(repr=False, compare=False)
    nodes: tuple[fx.Node, ...] = field(repr=False)
    neuron_wise: bool = True
    calls: int = 1
    shared_expert: bool = False

    @property
    def projected(self) -> tuple[str, ...]:
        """Names of its weights and biases."""
        names = [name for p in (*self.ups, self.down) for name in (p.weight, p.bias) if name]
        return tuple(dict.fromkeys(names))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of its weights and biases, and of the parameters inside the region."""
        return tuple(dict.fromkeys([*self.projected, *learned(self.region)]))


@dataclass(frozen=True)
class Refusal:
    """Something that looks like an FFN and is not.

    Attributes:
        name: Path of the projection that would lead back.
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
