"""What the matcher may assume of ATen operators: one table, which everything in `matching/` reads.

An operator that the table does not name has no trait but `POINTWISE`, and that only where torch tags it so.
"""

from __future__ import annotations

from enum import Flag, auto
from functools import cache

import torch
from torch import fx


class Trait(Flag):
    """Something that holds of an operator. Most operators have several."""

    NONE = 0
    RESHAPE = auto()  # changes the list of positions only, if the features of each position stay together
    COPY = auto()  # returns the same values: casts, copies, dropout
    NEUTRAL = auto()  # is a copy that a captured activation does without: no cast, and nothing that stops gradients
    TRANSPOSE = auto()  # changes the order of the dimensions only
    VIEW = auto()  # returns a view, so that strides tell where each value came from
    MOVE = auto()  # moves positions to other places and leaves the values alone
    POINTWISE = auto()  # treats every value by itself
    ALONG = auto()  # works along its argument `dim`: position-wise where that is the dimension of the features
    NORM = auto()  # normalizes the last dimensions
    LINEAR = auto()  # is a sum, a scaling or a selection: no nonlinearity
    SUM = auto()  # adds or subtracts two values
    SCALE = auto()  # multiplies or divides two values
    FORWARD = auto()  # changes a residual stream without mixing its features by learned weights
    REDUCTION = auto()  # combines or compares the values along a dimension
    CHOICE = auto()  # chooses among values: a sparse activation among the features, a router otherwise
    ROUTING = auto()  # makes a choice of experts from router logits
    PICK = auto()  # reads some positions, by their numbers
    WEIGH = auto()  # can apply what a router decided: weights, or the positions that an expert writes
    PRODUCT = auto()  # is a matrix product
    STACKED = auto()  # is a product that also takes stacks of matrices, as attention and stacked experts need it
    MIX = auto()  # mixes features by learned weights; not `matmul`: hyper-connections multiply the stream by it
    ATTENTION = auto()  # is a whole attention
    CONVOLUTION = auto()  # is a convolution
    CHANNELS_FIRST = auto()  # takes dimension 1 for the features
    UNKNOWN = auto()  # stands in for a module that could not be traced (`moeify.tracing.stand_in`)
    IDLE = auto()  # checks a value or reads its size, and passes no value on


# The values pass through: two nodes with nothing else between them hold the same activation.
TRANSPARENT = Trait.RESHAPE | Trait.COPY

_SELECT = Trait.VIEW | Trait.MOVE | Trait.LINEAR
_TABLE: dict[str, Trait] = {
    "view reshape reshape_as view_as _unsafe_view flatten unflatten squeeze unsqueeze": Trait.RESHAPE,
    "clone contiguous dropout": Trait.COPY | Trait.NEUTRAL,
    "to _to_copy type_as alias detach lift_fresh_copy native_dropout alpha_dropout feature_dropout": Trait.COPY,
    "transpose permute t movedim swapaxes numpy_T mT": Trait.TRANSPOSE | _SELECT,
    "select unbind getitem": _SELECT,
    "slice narrow chunk unsafe_chunk split unsafe_split split_with_sizes tensor_split": _SELECT | Trait.ALONG,
    "cat": Trait.MOVE | Trait.LINEAR | Trait.ALONG,
    "stack expand expand_as repeat roll flip pad constant_pad_nd masked_fill masked_scatter index_copy": Trait.MOVE,
    "index index_select": Trait.MOVE | Trait.PICK,
    "gather": Trait.MOVE | Trait.PICK | Trait.ALONG,
    "index_put _index_put_impl": Trait.MOVE | Trait.WEIGH,
    "scatter": Trait.MOVE | Trait.WEIGH | Trait.ALONG,
    "scatter_add": Trait.WEIGH,
    "index_add": Trait.WEIGH | Trait.FORWARD,
    "where": Trait.MOVE | Trait.WEIGH | Trait.POINTWISE,
    "add sub rsub": Trait.SUM | Trait.LINEAR | Trait.FORWARD | Trait.POINTWISE,
    "mul": Trait.SCALE | Trait.WEIGH | Trait.FORWARD | Trait.POINTWISE,
    "div": Trait.SCALE | Trait.FORWARD | Trait.POINTWISE,
    "neg": Trait.LINEAR | Trait.FORWARD | Trait.POINTWISE,
    "addcmul lerp": Trait.SUM | Trait.FORWARD | Trait.POINTWISE,
    "mean sum": Trait.REDUCTION | Trait.ALONG | Trait.LINEAR | Trait.FORWARD,
    "amax amin softmax _softmax log_softmax var std norm linalg_vector_norm cumsum": Trait.REDUCTION | Trait.ALONG,
    "glu": Trait.ALONG,
    "topk sort": Trait.CHOICE | Trait.ROUTING | Trait.REDUCTION | Trait.ALONG,
    "kthvalue": Trait.CHOICE | Trait.ALONG,
    "argmax argsort one_hot multinomial": Trait.ROUTING,
    "layer_norm native_layer_norm rms_norm _fused_rms_norm": Trait.NORM,
    "batch_norm group_norm instance_norm": Trait.CHANNELS_FIRST,
    "conv1d conv2d conv3d": Trait.CONVOLUTION | Trait.CHANNELS_FIRST,
    "conv_transpose1d conv_transpose2d convolution": Trait.CONVOLUTION,
    "linear mm addmm": Trait.PRODUCT | Trait.MIX,
    "matmul": Trait.PRODUCT,
    "bmm baddbmm einsum": Trait.PRODUCT | Trait.STACKED,
    "scaled_dot_product_attention": Trait.ATTENTION,
    "embedding embedding_bag": Trait.MIX,
    "stand_in": Trait.UNKNOWN | Trait.MIX,
    "_assert_tensor_metadata sym_size": Trait.IDLE,
    # Pointwise by nature, but not tagged so by torch 2.13.
    "relu relu6 leaky_relu prelu rrelu elu celu selu gelu silu mish softplus threshold": Trait.POINTWISE,
    "hardswish hardtanh hardsigmoid hardshrink softshrink log_sigmoid": Trait.POINTWISE,
    "clamp clip square zeros_like ones_like": Trait.POINTWISE,
}
_OPERATORS = {name: traits for names, traits in _TABLE.items() for name in names.split()}


def op_name(node: fx.Node) -> str:
    """Return the operator's base name ("mul" for aten.mul.Tensor), or "" for what is not a function call."""
    return _name(node.target) if node.op == "call_function" else ""


def has(node: fx.Node, traits: Trait) -> bool:
    """Whether the operator of `node` has at least one of `traits`."""
    return node.op == "call_function" and bool(_traits(node.target) & traits)


@cache
def _traits(target: object) -> Trait:
    tagged = torch.Tag.pointwise in getattr(target, "tags", ())
    return _OPERATORS.get(_name(target), Trait.NONE) | (Trait.POINTWISE if tagged else Trait.NONE)


@cache
def _name(target: object) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1].rstrip("_") or target._schema.name
    return getattr(target, "__name__", "")
