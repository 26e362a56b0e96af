"""Every opaque node of a graph becomes what a target runs, and nothing is left that a GPU cannot."""

from __future__ import annotations

import onnx_ir as ir

from moeify.errors import RefusedError
from moeify.export.capture.interface import EXPERTS
from moeify.export.lower.contrib import lower_contrib
from moeify.export.lower.experts import opaque_nodes
from moeify.export.lower.precision import widen_undefined
from moeify.export.lower.sizes import settle_sizes
from moeify.export.lower.standard import lower_standard
from moeify.export.lower.weights import Rounded
from moeify.export.targets import Form


def lower(model: ir.Model, form: Form) -> Rounded:
    """Replace every opaque node of `model`, and what no runtime or no CUDA graph takes; in place.

    Returns:
        For each weight that was rounded, by its name in the model, what makes the values that the graph computes with.

    Raises:
        RefusedError: the target has no operator for a layer, or there is nothing to quantize.
    """
    rounded: Rounded = {}
    if form.operator is not None:
        if form.operator.bits and not opaque_nodes(model, EXPERTS):
            raise RefusedError("the model has no experts to quantize: convert it first, or leave quantize out")
        rounded = lower_contrib(model, form.operator)
    lower_standard(model)
    settle_sizes(model)
    widen_undefined(model)
    return rounded
