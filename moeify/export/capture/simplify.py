"""Tidy a graph as the exporter left it: constants folded, what does nothing or is there twice removed.

`torch.onnx.export(optimize=True)` would do the same, but with a rule that looks at all nodes again for every node: two
thirds of the time of an export of 30 layers. It is left out here.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules

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


def simplify(model: ir.Model) -> None:
    """Tidy `model`, in place."""
    for _ in range(_ROUNDS):
        optimizer.fold_constants(model, should_fold=_keeps_weights)
        rewriter.rewrite(model, _RULES)
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
