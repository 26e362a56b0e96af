"""What an opaque node of experts says, read once for every lowering."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from moeify.errors import RefusedError
from moeify.export.capture.clamped_gate import ClampedGate
from moeify.export.capture.interface import DOMAIN, EXPERTS, GROUPED_LINEAR

_PARAMETERS = ("up", "down", "up_bias", "down_bias")


@dataclass(frozen=True)
class LayerKind:
    """What two layers must share to be calls of one function.

    Attributes:
        experts: How many there are.
        activation: A name that the kernels know.
        gated: Whether the activation gates a second up projection.
        clamped: The gate, if it has a clamp.
        parameters: Which weights and biases the layer has.
        dtype: Of the activations and the weights.
        complete: Whether every choice is known to be an expert, which spares the search for others.
    """

    experts: int
    activation: str
    gated: bool
    clamped: ClampedGate | None
    parameters: tuple[str, ...]
    dtype: ir.DataType
    complete: bool = False


@dataclass(frozen=True)
class Experts:
    """The inputs of an opaque node `moeify::Experts`, and what it computes.

    `stacked` holds up (E, J, H) and down (E, H, I), and up_bias (E, J) and down_bias (E, H) where the layer has them.
    """

    x: ir.Value
    ids: ir.Value
    weights: ir.Value
    stacked: dict[str, ir.Value]
    kind: LayerKind


def read_experts(node: ir.Node) -> Experts:
    """Read an opaque node.

    Raises:
        RefusedError: the number of experts is not a constant.
    """
    x, ids, weights, *rest = node.inputs
    assert x is not None and ids is not None and weights is not None
    stacked = {name: value for name, value in zip(_PARAMETERS, rest, strict=False) if value is not None}
    attributes, clamped, count = node.attributes, None, count_of(stacked["up"])
    if "alpha" in attributes:
        alpha, beta, limit = (attributes[name].as_float() for name in ("alpha", "beta", "limit"))
        clamped = ClampedGate(alpha, beta, limit, bool(attributes["alternating"].as_int()))
    kind = LayerKind(
        count, attributes["activation"].as_string(), bool(attributes["gated"].as_int()), clamped, tuple(stacked),
        dtype_of(x), _complete(ids, count),
    )  # fmt: skip
    return Experts(x, ids, weights, stacked, kind)


def opaque_nodes(model: ir.Model, *kinds: str) -> list[ir.Node]:
    """Return the opaque nodes of a graph, of some kinds or of all."""
    return [n for n in model.graph if n.domain == DOMAIN and n.op_type in (kinds or (EXPERTS, GROUPED_LINEAR))]


def count_of(stacked: ir.Value) -> int:
    """Return the number of experts of a stacked weight.

    Raises:
        RefusedError: it is no constant.
    """
    if stacked.shape is None or not isinstance(stacked.shape[0], int):
        raise RefusedError(f"the number of experts of {stacked.name} is not a constant: export a model with fixed ones")
    return stacked.shape[0]


def dtype_of(x: ir.Value) -> ir.DataType:
    """Return the dtype of a value that has one."""
    assert x.dtype is not None
    return x.dtype


def _complete(ids: ir.Value, experts: int) -> bool:
    """Whether the ids are the places of the largest of as many numbers as there are experts."""
    node = ids.producer()
    if node is None or node.op_type != "TopK" or node.inputs[0] is None:
        return False
    shape = node.inputs[0].shape
    return shape is not None and shape[-1] == experts
