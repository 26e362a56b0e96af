"""What an opaque node of experts says, read once for every lowering."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from moeify.errors import RefusedError
from moeify.export.capture.clamped_gate import ClampedGate
from moeify.export.capture.opaque import DOMAIN, EXPERTS, GROUPED_LINEAR


@dataclass(frozen=True)
class Experts:
    """An opaque node `moeify::Experts`.

    Attributes:
        x: Tokens (T, H).
        expert_ids: (T, K).
        weights: (T, K).
        up: (E, J, H).
        down: (E, H, I).
        up_bias: (E, J), or None.
        down_bias: (E, H), or None.
        activation: A name that the kernels know.
        gated: Whether the activation gates a second up projection.
        clamped: What stands between the projections instead, if it has a clamp.
    """

    x: ir.Value
    expert_ids: ir.Value
    weights: ir.Value
    up: ir.Value
    down: ir.Value
    up_bias: ir.Value | None
    down_bias: ir.Value | None
    activation: str
    gated: bool
    clamped: ClampedGate | None

    @classmethod
    def read(cls, node: ir.Node) -> Experts:
        """Read a node."""
        x, expert_ids, weights, up, down, up_bias, down_bias = [*node.inputs, None, None][:7]
        assert x is not None and expert_ids is not None and weights is not None and up is not None and down is not None
        clamped, attributes = None, node.attributes
        if "alpha" in attributes:
            alpha, beta, limit = (attributes[name].as_float() for name in ("alpha", "beta", "limit"))
            clamped = ClampedGate(alpha, beta, limit, bool(attributes["alternating"].as_int()))
        return cls(
            x, expert_ids, weights, up, down, up_bias, down_bias,
            attributes["activation"].as_string(), bool(attributes["gated"].as_int()), clamped,
        )  # fmt: skip

    @property
    def dtype(self) -> ir.DataType:
        """What the layer computes in."""
        return dtype_of(self.x)

    @property
    def count(self) -> int:
        """The number of experts."""
        return experts_of(self.up)

    @property
    def choices(self) -> int | None:
        """The number of experts per token, None if it is no constant."""
        choices = None if self.expert_ids.shape is None else self.expert_ids.shape[1]
        return choices if isinstance(choices, int) else None


def opaque_nodes(model: ir.Model, *kinds: str) -> list[ir.Node]:
    """Return the opaque nodes of a graph, of some kinds or of all."""
    return [n for n in model.graph if n.domain == DOMAIN and n.op_type in (kinds or (EXPERTS, GROUPED_LINEAR))]


def experts_of(stacked: ir.Value) -> int:
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
