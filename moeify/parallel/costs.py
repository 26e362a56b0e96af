"""What is given to an estimate of expert parallelism, and what comes out: data only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """An MoE layer, or several of the same sizes.

    Attributes:
        count: How many.
        experts: E.
        top_k: K.
        hidden: H.
        intermediate: I of one expert.
        up_rows: J, 2I with a gate.
        parameters: Of one expert.
        capacity_factor: In training, counted with top_k; None for none.
        min_capacity: Tokens that an expert takes whatever the factor.
        balanced: Whether each expert takes exactly its capacity (expert choice).
        slots: Whether slots travel and not tokens (soft mixtures).
    """

    count: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    up_rows: int
    parameters: int
    capacity_factor: float | None = None
    min_capacity: int = 1
    balanced: bool = False
    slots: bool = False


@dataclass(frozen=True)
class Setup:
    """A model and the ranks that train it.

    Attributes:
        layers: Its MoE layers.
        parameters: All of the model.
        value_bytes: Of a value in weights and activations.
        ep: Ranks that share the experts.
        copies: Groups of so many ranks.
        tokens: Of a rank in one forward pass.
        bandwidth: Bytes per second to and from a rank.
        flops: Floating-point operations per second of a rank, as they are reached.
    """

    layers: tuple[Layer, ...]
    parameters: int
    value_bytes: int
    ep: int
    copies: int
    tokens: int
    bandwidth: float
    flops: float


@dataclass(frozen=True)
class AtCapacity:
    """A layer under one capacity factor; even routing unless said otherwise.

    Attributes:
        factor: Counted with top_k; None for no capacity.
        capacity: Tokens of one rank that an expert takes at most.
        dropped: Share of the choices that is dropped if tokens choose at random.
        rows: Rows that a rank computes.
        worst_rows: The most that a rank can get.
        exchanged: Bytes that a rank sends to others in a step.
        kept: Bytes of activations of the routed experts that a rank keeps for backward.
        worst_kept: The same for `worst_rows`.
    """

    factor: float | None
    capacity: int
    dropped: float
    rows: int
    worst_rows: int
    exchanged: int
    kept: int
    worst_kept: int


@dataclass(frozen=True)
class LayerEstimate:
    """One MoE layer in a step.

    Attributes:
        layer: Its sizes.
        at: Under each capacity.
        exchange_seconds: Of the exchange, under the capacity that the layer has.
        compute_seconds: Of the routed experts, forward and backward.
    """

    layer: Layer
    at: tuple[AtCapacity, ...]
    exchange_seconds: float
    compute_seconds: float

    @property
    def ratio(self) -> float:
        """Return the time of the exchange over that of the experts."""
        return self.exchange_seconds / self.compute_seconds


@dataclass(frozen=True)
class Engine:
    """What becomes of the experts under one engine; bytes and seconds of a rank in a step of the whole model.

    Attributes:
        name: Of the engine.
        exchanged: Bytes of tokens that it sends.
        gathered: Bytes of experts' weights and gradients that it sends.
        waits: Seconds of these that computing the experts cannot hide: tokens are waited for, weights are needed later.
        weights: Bytes of weights, gradients and AdamW's two moments.
        whole: Bytes of one layer's experts, weights and gradients, that are whole in memory besides.
    """

    name: str
    exchanged: int
    gathered: int
    waits: float
    weights: int
    whole: int


@dataclass(frozen=True)
class Estimate:
    """What a training step costs.

    Attributes:
        setup: What was given.
        layers: Each kind of MoE layer.
        engines: Expert parallelism with FSDP and with DDP around it, and FSDP alone.
        advice: What follows, in words.
    """

    setup: Setup
    layers: tuple[LayerEstimate, ...]
    engines: tuple[Engine, ...]
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        layers = [{**asdict(each), "ratio": each.ratio} for each in self.layers]
        return {**asdict(self), "layers": layers, "advice": list(self.advice)}
