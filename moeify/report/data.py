"""What a report says, as plain data: one frozen dataclass for each of its sections.

`to_dict` gives the JSON of `moeify report --json`; the page shows the same numbers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

OVERLOADED = 2.0  # times the fair share


@dataclass(frozen=True)
class Conversion:
    """How a model was made.

    Attributes:
        source: Type of the dense model.
        target: Format of the output.
        ffns: How many FFNs became MoE layers.
        where: Their paths, folded.
        settings: Of the conversion, those that differ from the defaults.
        dtype: What the output was told to store; None for the dtype of the source.
        remarks: What must be known of the format.
    """

    source: str
    target: str
    ffns: int
    where: str
    settings: dict[str, str]
    dtype: str | None
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """Parameters, those that a token meets, bytes of the checkpoint, and FLOPs per token."""

    parameters: int
    active: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class Ranks:
    """One step of training with the experts shared by ranks.

    Attributes:
        ranks: How many.
        sent: Bytes of tokens that a rank sends.
        trained: Bytes of weights, gradients and optimizer's moments on a rank.
        waits: Seconds of the exchange that a rank waits for.
        advice: What follows, in words.
    """

    ranks: int
    sent: int
    trained: int
    waits: float
    advice: str


@dataclass(frozen=True)
class Costs:
    """What a model costs.

    Attributes:
        moe: The model.
        dense: The dense model that it is compared with.
        memory: Bytes of all weights by dtype.
        assumed: Of the rows below, in words.
        parallel: Numbers of ranks that can share the experts.
    """

    moe: Size
    dense: Size | None
    memory: dict[str, int]
    assumed: str = ""
    parallel: tuple[Ranks, ...] = ()


@dataclass(frozen=True)
class LayerProof:
    """An MoE layer beside its dense FFN: their relative difference, what it was computed in, and the tolerance."""

    name: str
    relative: float
    dtype: str
    tolerance: float


@dataclass(frozen=True)
class Proof:
    """A comparison with the dense model; see `moeify.proving.report.VerifyReport`.

    Attributes:
        when: In words.
        passed: Whether the promise holds.
        relative: Difference of the logits over the largest logit.
        tolerance: Of that; None where no equality is promised.
        top1_agreement: Share of positions with the same first logit.
        altered: Stored tensors that are not what the plan makes of the dense model.
        layers: Each layer.
    """

    when: str
    passed: bool
    relative: float
    tolerance: float | None
    top1_agreement: float
    altered: int
    layers: tuple[LayerProof, ...]


@dataclass(frozen=True)
class Pair:
    """Two experts, and how often they are chosen together over how often they would be by chance."""

    first: int
    second: int
    lift: float


@dataclass(frozen=True)
class LayerRouting:
    """What one router did on the text.

    Attributes:
        name: Path of the layer.
        experts: How many.
        top_k: Choices of a token; None where it varies.
        choices: Before capacity.
        load: Of each expert, in multiples of the fair share 1 / experts.
        entropy: Of a token's probabilities over log(experts): 1 is undecided.
        dropped: Share of the choices above capacity.
        idle: Experts without a token.
        overloaded: Experts above `OVERLOADED` times the fair share.
        logit_size: Root of the mean square of the router logits.
        logit_max: The largest absolute router logit.
        losses: Without coefficients.
        together: Of the tokens of each expert, the share that chose each other one; empty with many experts.
        pairs: Those chosen together most above chance.
    """

    name: str
    experts: int
    top_k: int | None
    choices: int
    load: tuple[float, ...]
    entropy: float
    dropped: float
    idle: tuple[int, ...]
    overloaded: tuple[int, ...]
    logit_size: float
    logit_max: float
    losses: dict[str, float]
    together: tuple[tuple[float, ...], ...] = ()
    pairs: tuple[Pair, ...] = ()


@dataclass(frozen=True)
class LayerWeights:
    """The experts' weights of one layer.

    Attributes:
        name: Path of the layer.
        mean: Mean cosine of two experts; 1 for equal ones.
        closest: The pair with the largest cosine, and the farthest; None with one expert.
        cosine: Of each pair; empty with many experts.
        distance: Of each expert from its part of the dense FFN, over the size of that; empty where it is not known.
    """

    name: str
    mean: float
    closest: tuple[int, int, float] | None
    farthest: tuple[int, int, float] | None
    cosine: tuple[tuple[float, ...], ...] = ()
    distance: tuple[float, ...] = ()


@dataclass(frozen=True)
class PassageLayer:
    """One layer's choices for the tokens of the passage: experts and weights, the largest weight first."""

    name: str
    experts: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Text:
    """What the model was run on.

    Attributes:
        source: Where it is from, in words.
        tokens: How many.
        perplexity: Of the model; None where it predicts no text.
        dense_perplexity: Of the dense model, where one is given.
        passage: The first tokens, as text or ids.
        layers: What each layer chose for them.
    """

    source: str
    tokens: int
    perplexity: float | None
    dense_perplexity: float | None
    passage: tuple[str, ...]
    layers: tuple[PassageLayer, ...]


@dataclass(frozen=True)
class Curve:
    """A number over the steps of a run, or its mean over several logged windows."""

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class LoadHistory:
    """The load of one layer's experts over a run, in multiples of the fair share: a row for each expert."""

    name: str
    load: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Training:
    """A run.

    Attributes:
        steps: Of the points of the curves.
        curves: What was logged.
        load_steps: Of the columns of the histories.
        loads: Of every layer.
        windows: How many were logged.
    """

    steps: tuple[int, ...]
    curves: tuple[Curve, ...]
    load_steps: tuple[int, ...]
    loads: tuple[LoadHistory, ...]
    windows: int


@dataclass(frozen=True)
class Report:
    """The whole: sections that nothing is known of are None or empty.

    Attributes:
        title: What the report is of.
        version: Of moeify.
        made: When, as ISO 8601.
        model_type: As transformers calls it.
        engines: What runs the model.
        notes: What a reader must know, without a full stop.
        findings: What the numbers say, in sentences.
        layers: The MoE layers, as in `moeify inspect --json`.
    """

    title: str
    version: str
    made: str
    model_type: str = ""
    engines: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    layers: tuple[dict[str, Any], ...] = ()
    conversion: Conversion | None = None
    costs: Costs | None = None
    proofs: tuple[Proof, ...] = ()
    text: Text | None = None
    routing: tuple[LayerRouting, ...] = ()
    weights: tuple[LayerWeights, ...] = ()
    training: Training | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)
