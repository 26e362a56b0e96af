"""Which lowering a target gets, and the oldest ONNX Runtime that computes it right."""

from __future__ import annotations

import onnx_ir as ir

from moeify.errors import RefusedError
from moeify.export.lower_contrib import Contrib, lower_contrib, why_not
from moeify.export.lower_standard import lower_standard
from moeify.export.report import Quantization, Target
from moeify.export.requirements import MINIMUM, check_runtime
from moeify.export.translate import DOMAIN, EXPERTS

# From this many experts on, one MoE node decodes faster on the CPU than two standard nodes per expert
# (benchmarks/onnx_layer.md).
MANY_EXPERTS = 64
_CUDA = (1, 28)  # before, the CUDA kernel ignored the attributes of SwiGLU
_FOUR_BITS = (1, 31)  # before, QMoE knew no accuracy_level, and no blocks on CUDA
_BLOCK = 32  # values that share a scale: the smallest that the CUDA kernel takes too


def lower(model: ir.Model, target: Target, quantize: Quantization | None) -> tuple[int, ...]:
    """Replace every opaque node of `model`, in place.

    Returns:
        The oldest ONNX Runtime for the result.

    Raises:
        RefusedError: the target has no operator for a layer, or there is nothing to quantize.
        MoeifyError: the ONNX Runtime that is installed is too old for the proof.
    """
    minimum = _CUDA if target == "cuda" else MINIMUM
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type == EXPERTS]
    if quantize is not None:
        minimum = _FOUR_BITS if quantize == "int4" else minimum
        if not nodes:
            raise RefusedError("the model has no experts to quantize: convert it first, or leave quantize out")
        bits = {"int8": Contrib(8), "int4": Contrib(4, _BLOCK, int8_activations=target == "cpu")}
        check_runtime(minimum)
        lower_contrib(model, bits[quantize])
    elif target == "cuda":
        check_runtime(minimum)
        lower_contrib(model, Contrib())
    elif target == "cpu":
        many = [node for node in nodes if _experts(node) >= MANY_EXPERTS and why_not(node, Contrib()) is None]
        lower_contrib(model, Contrib(), only=many)
    lower_standard(model)
    return minimum


def _experts(node: ir.Node) -> int:
    up = node.inputs[3]
    size = 0 if up is None or up.shape is None else up.shape[0]
    return size if isinstance(size, int) else 0
