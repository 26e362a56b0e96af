"""The targets of an export, as data. A new target is one more entry of `TARGETS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

HALF = ("float16", "bfloat16")
FLOATS = ("float32", *HALF)
# From this many experts on, one MoE node decodes faster on the CPU than two standard nodes per expert
# (benchmarks/onnx_layer.md).
MANY_EXPERTS = 64


@dataclass(frozen=True)
class Operator:
    """One of ONNX Runtime's own operators, as the kernels of a target take it.

    Attributes:
        bits: 8 or 4 for `QMoE`, which stores quantized weights; None for `MoE`.
        block: How many values share a scale; None for one scale per row.
        multiple: What the hidden size and the intermediate size must be multiples of.
        attributes: Further attributes of the node.
        late_attributes: Those that a node gets after the proof, because they give up exactness for speed.
        min_experts: Layers with fewer experts, and those that the operator cannot express, become standard operators;
            0 refuses a layer that the operator cannot express.
    """

    bits: int | None = None
    block: int | None = None
    multiple: int = 1
    attributes: Mapping[str, int] = field(default_factory=dict)
    late_attributes: Mapping[str, int] = field(default_factory=dict)
    min_experts: int = 0

    @property
    def name(self) -> str:
        """The operator's name in ONNX Runtime."""
        return "QMoE" if self.bits else "MoE"

    @property
    def all_attributes(self) -> dict[str, int]:
        """`attributes`, and those that say how weights are stored."""
        stored = {"expert_weight_bits": self.bits, "block_size": self.block}
        return {name: value for name, value in stored.items() if value is not None} | dict(self.attributes)


@dataclass(frozen=True)
class Form:
    """How a target computes experts whose weights are stored in one way.

    Attributes:
        runtime: The oldest ONNX Runtime that computes it right.
        dtypes: What it computes in.
        operator: What a layer becomes; None for standard operators.
    """

    runtime: tuple[int, int]
    dtypes: tuple[str, ...]
    operator: Operator | None = None


@dataclass(frozen=True)
class Target:
    """What an ONNX file is made for.

    Attributes:
        name: As users write it.
        about: A few words for users.
        provider: ONNX Runtime's execution provider, None for any.
        default_dtype: What the command line loads a model in.
        forms: How experts are computed, by the way their weights are stored; None stores them in the model's dtype.
    """

    name: str
    about: str
    provider: str | None
    default_dtype: str
    forms: Mapping[str | None, Form]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Everything that the target computes in."""
        return tuple(dict.fromkeys(dtype for form in self.forms.values() for dtype in form.dtypes))


_CPU = {
    None: Form((1, 23), ("float32",), Operator(min_experts=MANY_EXPERTS)),  # the oldest that the tests were run with
    # Before 1.24, QMoE took every expert for a gated one. With blocks of 8 bits it would also round activations.
    "int8": Form((1, 24), ("float32",), Operator(8)),
    # Before 1.31, QMoE knew no accuracy_level; level 4 rounds activations to 8 bits, which is several times faster.
    "int4": Form((1, 31), ("float32",), Operator(4, 32, multiple=32, late_attributes={"accuracy_level": 4})),
}
_PLAIN_BYTES = {"weights_prepacked": 0}  # else CUDA takes the bytes for packed ones, and gives noise
_CUDA = {
    # 8: CUDA loads 16 bytes at a time; 64: rows of a tile of packed weights (ONNX Runtime's
    # docs/contrib_ops/cuda/moe_qmoe.md, sections 4.2 and 6.1). 32 is the smallest block that CUDA takes.
    None: Form((1, 28), FLOATS, Operator(multiple=8)),  # before, MoE ignored the attributes of SwiGLU
    "int8": Form((1, 28), HALF, Operator(8, multiple=64, attributes=_PLAIN_BYTES)),
    "int4": Form((1, 31), HALF, Operator(4, 32, multiple=64, attributes=_PLAIN_BYTES)),  # before, QMoE knew no blocks
}
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("cpu", "ONNX Runtime on a CPU", "CPUExecutionProvider", "float32", _CPU),
        Target("cuda", "onnxruntime-gpu", "CUDAExecutionProvider", "float16", _CUDA),
        Target("portable", "standard operators only", None, "float32", {None: Form((1, 23), FLOATS)}),
    )
}


def quantizations() -> tuple[str, ...]:
    """Return every way in which some target stores quantized weights."""
    return tuple(dict.fromkeys(name for target in TARGETS.values() for name in target.forms if name is not None))
