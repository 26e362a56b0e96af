"""The weights of an exported graph: read as torch tensors, rounded, and added without copies.

Shape legend: E experts, N rows, K values in a row, B blocks in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from moeify.errors import RefusedError
from moeify.kernels.quantized import pack

# For each weight that was rounded, by name, what makes the values that an operator computes with.
Rounded = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Stored:
    """A weight, which the graph may transpose before it is used.

    Attributes:
        name: Of the initializer.
        tensor: The weight as it is used, a view of the initializer.
        axes: How to permute it to what is stored.
    """

    name: str
    tensor: Tensor
    axes: list[int]


def stored(value: ir.Value) -> Stored:
    """Return the weight that a value of the graph is.

    Raises:
        RefusedError: the value depends on the inputs.
    """
    used, perms = value, list[list[int]]()
    while (node := value.producer()) is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        perms.append(list(node.attributes["perm"].as_ints()))
        value = node.inputs[0]
    if value.const_value is None:
        raise RefusedError(
            f"the expert weights {used.name} are computed by the model, not stored: export needs them constant"
        )
    raw = getattr(value.const_value, "raw", None)
    tensor = raw.detach() if isinstance(raw, Tensor) else _tensor(value.const_value)
    axes = list(range(tensor.dim()))
    for perm in reversed(perms):
        tensor, axes = tensor.permute(perm), [axes[axis] for axis in perm]
    return Stored(str(value.name), tensor, [axes.index(axis) for axis in range(len(axes))])


def unstacked(graph: ir.Graph, value: ir.Value) -> list[ir.Value]:
    """Return one initializer for each entry of a stacked weight's first dimension."""
    weight = stored(value)
    names = [f"{weight.name}.{number}" for number in range(weight.tensor.shape[0])]
    return [add(graph, name, TorchTensor(part, name=name)) for name, part in zip(names, weight.tensor, strict=True)]


def add(graph: ir.Graph, name: str, contents: TorchTensor | ir.LazyTensor) -> ir.Value:
    """Add an initializer, or return the one of that name: layers may share their weights."""
    if name not in graph.initializers:
        kind = ir.TensorType(contents.dtype)
        graph.register_initializer(ir.Value(name=name, shape=contents.shape, type=kind, const_value=contents))
    return graph.initializers[name]


def add_lazy(graph: ir.Graph, name: str, compute: Callable[[], Tensor], like: Tensor) -> ir.Value:
    """Add an initializer that is computed when it is written, of the shape and dtype of `like`."""
    dtype, shape = TorchTensor(like).dtype, ir.Shape(like.shape)
    return add(graph, name, ir.LazyTensor(lambda: TorchTensor(compute(), name=name), dtype, shape, name=name))


def _tensor(constant: ir.TensorProtocol) -> Tensor:
    """Return what was folded into a constant; NumPy's own types leave bfloat16 out."""
    array = constant.numpy().copy()
    if constant.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
    return torch.from_numpy(array)


@dataclass(frozen=True)
class Quantized:
    """Weights w = (q - 2^(bits-1)) · scale; for the other attributes see `quantize`.

    Attributes:
        packed: uint8 (E, N, K · bits / 8), the first value in the low bits.
        scales: (E, N) or, with blocks, (E, N, B), in the weights' dtype; of either sign.
    """

    packed: Tensor
    scales: Tensor
    bits: int
    block: int | None

    def dequantized(self) -> Tensor:
        """Return the weights that the operator computes with, (E, N, K)."""
        q = self.packed if self.bits == 8 else torch.stack((self.packed & 15, self.packed >> 4), dim=-1).flatten(-2)
        centred: Tensor = (q.int() - (1 << (self.bits - 1))).to(self.scales.dtype)
        blocks = _blocks(centred, self.block)
        scales = self.scales if self.block else self.scales[..., None]
        weights: Tensor = (blocks * scales[..., None]).flatten(-2)
        return weights


def quantize(weights_ENK: Tensor, bits: int, block: int | None) -> Quantized:
    """Round weights to the nearest of 2^bits levels around zero.

    Of each group with one scale the value farthest from zero becomes the level -2^(bits-1), which has no counterpart:
    scales are negative where that value is positive. In 4 bits the sixteenth level takes a fifth of the error.

    Args:
        weights_ENK: (E, N, K), any float dtype; K a multiple of the block, and even for 4 bits.
        bits: 8 or 4.
        block: Values that share a scale; None for a whole row.
    """
    blocks_ENBK = _blocks(weights_ENK.float(), block)
    zero = 1 << (bits - 1)
    farthest_ENB1 = blocks_ENBK.abs().argmax(-1, keepdim=True)
    scales_ENB = (blocks_ENBK.gather(-1, farthest_ENB1)[..., 0] / -zero).to(weights_ENK.dtype)
    divisor = torch.where(scales_ENB == 0, 1, scales_ENB).float()[..., None]
    q = ((blocks_ENBK / divisor).round().clamp(-zero, zero - 1) + zero).to(torch.uint8).flatten(-2)
    packed = q if bits == 8 else pack(q)
    return Quantized(packed.contiguous(), scales_ENB if block else scales_ENB[..., 0].contiguous(), bits, block)


def _blocks(x_ENK: Tensor, block: int | None) -> Tensor:
    """(E, N, K) as (E, N, B, block)."""
    return x_ENK.reshape(*x_ENK.shape[:-1], -1, block or x_ENK.shape[-1])
