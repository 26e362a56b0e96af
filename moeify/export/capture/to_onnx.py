"""A trace becomes an ONNX graph with opaque expert nodes, named as the model names its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnx_ir.passes import common
from onnxscript import onnx_opset, optimizer, rewriter, values
from onnxscript.rewriter.rules import common as rules

from moeify.errors import RefusedError
from moeify.export.capture.interface import DOMAIN, EXPERTS, GROUPED_LINEAR, OPSET, Interface
from moeify.export.capture.trace import PREFIX, Capture, cause_of, undisturbed
from moeify.kernels import operators  # noqa: F401 (defines torch.ops.moeify)

_OP: Any = onnx_opset.opset20
_RULES = (
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.mul_by_1_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.unsqueeze_unsqueeze_rule,
)
_ROUNDS = 2  # what a rule leaves may be a constant, and what is folded may match a rule


def to_onnx(captured: Capture) -> ir.Model:
    """Translate a trace.

    Returns:
        A model whose experts are opaque nodes (see `moeify.export.capture.interface`); weights are not copied.

    Raises:
        RefusedError: ONNX cannot express an operator.
    """
    interface = captured.interface
    with undisturbed():
        try:
            translated = torch.onnx.export(
                captured.program,
                (),
                dynamo=True,
                input_names=list(interface.inputs),
                output_names=list(interface.outputs),
                custom_translation_table=_translations(),
                opset_version=OPSET,
                optimize=False,  # see _simplify
                verbose=False,
            )
        except Exception as error:
            raise RefusedError(f"the model has an operator that ONNX cannot express: {cause_of(error)}") from error
        assert translated is not None
        model: ir.Model = translated.model
        _simplify(model)
    _name(model.graph, interface)
    return model


def _name(graph: ir.Graph, interface: Interface) -> None:
    """Give weights the names of the state dict, and the dimensions of inputs and outputs theirs."""
    for name, value in list(graph.initializers.items()):
        if name.startswith(PREFIX):
            value.name = name.removeprefix(PREFIX)
    symbols = {
        str(value.shape[axis]): name
        for value in graph.inputs
        if value.shape is not None
        for axis, name in interface.axes[str(value.name)].items()
    }
    for value in graph.inputs:
        _name_dimensions(value, interface.axes[str(value.name)], symbols)
    for value in graph.outputs:
        _name_dimensions(value, interface.output_axes.get(str(value.name), {}), symbols)


def _name_dimensions(value: ir.Value, names: Mapping[int, str], symbols: Mapping[str, str]) -> None:
    """Name dimensions by their place, or by the name that an input gave to the symbol of the trace."""
    if value.shape is not None:
        value.shape = ir.Shape([names.get(axis, symbols.get(str(size), size)) for axis, size in enumerate(value.shape)])


def _translations() -> dict[Callable[..., object], Callable[..., object]]:
    """Return the table that `torch.onnx.export(custom_translation_table=…)` takes."""
    experts = _opaque(EXPERTS, 7, activation=OpSchema.AttrType.STRING, gated=OpSchema.AttrType.INT)
    grouped_linear = _opaque(GROUPED_LINEAR, 4)

    def translate_experts(
        x: object, ids: object, weights: object, up: object, down: object, up_bias: object, down_bias: object,
        activation: str, gated: bool, implementation: str,
    ) -> object:  # fmt: skip
        return experts(x, ids, weights, up, down, up_bias, down_bias, activation=activation, gated=int(gated))

    def translate_grouped_linear(x: object, w: object, b: object, offsets: object, implementation: str) -> object:
        return grouped_linear(x, w, b, offsets)

    return {
        torch.ops.moeify.experts.default: translate_experts,
        torch.ops.moeify.grouped_linear.default: translate_grouped_linear,
        torch.ops.aten.searchsorted.Tensor: _searchsorted,
        torch.ops.aten.sort.stable: _sort_stable,
    }


def _sort_stable(x: object, stable: bool | None = None, dim: int = -1, descending: bool = False) -> object:
    """Sort by TopK, which puts the lower index first where values are equal."""
    length = _OP.Shape(x, start=dim, end=dim + 1 or None)
    return _OP.TopK(x, length, axis=dim, largest=int(descending), sorted=1)


def _searchsorted(
    sorted_sequence: object,
    values_: object,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: object = None,
) -> object:
    """Count the elements before each value, in one dimension, as the routing layout does."""
    compare = _OP.LessOrEqual if right or side == "right" else _OP.Less
    before = compare(_OP.Unsqueeze(sorted_sequence, [0]), _OP.Unsqueeze(values_, [1]))
    return _OP.ReduceSum(_OP.Cast(before, to=6 if out_int32 else 7), [1], keepdims=0)


def _opaque(name: str, inputs: int, **attributes: OpSchema.AttrType) -> values.Op:
    """Describe an opaque node; any of its inputs may be absent."""
    kinds = [f"tensor({kind})" for kind in ("float", "float16", "bfloat16", "double", "int64", "int32")]
    optional = OpSchema.FormalParameterOption.Optional
    schema = OpSchema(
        name, DOMAIN, 1,
        inputs=[OpSchema.FormalParameter(f"x{i}", f"T{i}", param_option=optional) for i in range(inputs)],
        outputs=[OpSchema.FormalParameter("y", "T0")],
        type_constraints=[(f"T{i}", kinds, "") for i in range(inputs)],
        attributes=[OpSchema.Attribute(key, kind, required=True) for key, kind in attributes.items()],
    )  # fmt: skip
    return values.Op(values.Opset(DOMAIN, 1), name, schema)


def _simplify(model: ir.Model) -> None:
    """Fold constants, and remove what does nothing or is there twice; in place.

    `torch.onnx.export(optimize=True)` would do the same, but with a rule that looks at all nodes again for every node:
    two thirds of the time of an export of 30 layers.
    """
    own_rules = copy.deepcopy(_RULES)  # a rule remembers the last graph that it saw, with all its weights
    for _ in range(_ROUNDS):
        optimizer.fold_constants(model, should_fold=_keeps_weights)
        rewriter.rewrite(model, own_rules)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _keeps_weights(node: ir.Node) -> bool | None:
    """Let no weight be stored transposed: it would lose its name, and the operators take it either way."""
    weight = node.op_type == "Transpose" and node.inputs[0] is not None and node.inputs[0].is_initializer()
    return False if weight else None
