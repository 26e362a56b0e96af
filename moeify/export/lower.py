"""Which lowering a target gets."""

from __future__ import annotations

import onnx_ir as ir

from moeify.errors import RefusedError
from moeify.export.lower_contrib import Contrib, Rounded, lower_contrib, why_not
from moeify.export.lower_standard import lower_standard
from moeify.export.quantize import SCHEMES
from moeify.export.report import Quantization, Target
from moeify.export.translate import DOMAIN, EXPERTS

# From this many experts on, one MoE node decodes faster on the CPU than two standard nodes per expert
# (benchmarks/onnx_layer.md).
MANY_EXPERTS = 64


def lower(model: ir.Model, target: Target, quantize: Quantization | None) -> Rounded:
    """Replace every opaque node of `model`, in place.

    Returns:
        For each weight that was rounded, by its name in the model, what makes the values that the graph computes with.

    Raises:
        RefusedError: the target has no operator for a layer, or there is nothing to quantize.
    """
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type == EXPERTS]
    rounded: Rounded = {}
    if quantize is not None:
        if not nodes:
            raise RefusedError("the model has no experts to quantize: convert it first, or leave quantize out")
        rounded = lower_contrib(model, Contrib(*SCHEMES[quantize], cuda=target == "cuda"))
    elif target == "cuda":
        lower_contrib(model, Contrib(cuda=True))
    elif target == "cpu":
        many = [node for node in nodes if _experts(node) >= MANY_EXPERTS and why_not(node, Contrib()) is None]
        lower_contrib(model, Contrib(), only=many)
    lower_standard(model)
    return rounded


def _experts(node: ir.Node) -> int:
    up = node.inputs[3]
    size = 0 if up is None or up.shape is None else up.shape[0]
    return size if isinstance(size, int) else 0
