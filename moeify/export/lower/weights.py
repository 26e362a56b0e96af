"""The weights of an exported graph as torch tensors, and new initializers made of them without copies."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor

from moeify.errors import RefusedError


class Weights:
    """Reads initializers, through the transposes that a model may put on them, and adds others.

    Args:
        graph: The graph that the initializers belong to.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.parts: dict[str, list[ir.Value]] = {}

    def tensor(self, value: ir.Value) -> Tensor:
        """Return the constant (a view of it where it is transposed).

        Raises:
            RefusedError: the value depends on the inputs.
        """
        node = value.producer()
        if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
            return self.tensor(node.inputs[0]).permute(*node.attributes["perm"].as_ints())
        if value.const_value is None:
            raise RefusedError(
                f"the expert weights {value.name} are computed by the model, not stored: export needs them constant"
            )
        raw = getattr(value.const_value, "raw", None)
        return raw if isinstance(raw, Tensor) else _tensor(value.const_value)

    def unstack(self, stacked: ir.Value) -> list[ir.Value]:
        """Return one initializer for each entry of a stacked weight's first dimension."""
        name = base_name(stacked)
        if name not in self.parts:
            tensor = self.tensor(stacked)
            self.parts[name] = [self.add(f"{name}.{e}", part) for e, part in enumerate(tensor.detach())]
        return self.parts[name]

    def add(self, name: str, tensor: Tensor) -> ir.Value:
        """Add an initializer."""
        return self._register(name, tensor_adapters.TorchTensor(tensor, name=name))

    def add_lazy(self, name: str, compute: Callable[[], Tensor], like: Tensor) -> ir.Value:
        """Add an initializer that is computed when it is written, of the shape and dtype of `like`."""
        dtype = tensor_adapters.TorchTensor(like).dtype
        contents = ir.LazyTensor(
            lambda: tensor_adapters.TorchTensor(compute(), name=name), dtype, ir.Shape(like.shape), name=name
        )
        return self._register(name, contents)

    def remove_unused(self) -> None:
        """Drop initializers that no node reads, and the transposes that only they had."""
        ir.passes.common.RemoveUnusedNodesPass()(ir.Model(self.graph, ir_version=10))

    def _register(self, name: str, contents: tensor_adapters.TorchTensor | ir.LazyTensor) -> ir.Value:
        value = ir.Value(name=name, shape=contents.shape, type=ir.TensorType(contents.dtype), const_value=contents)
        self.graph.register_initializer(value)
        return value


def _tensor(constant: ir.TensorProtocol) -> Tensor:
    """Return what was folded into a constant; NumPy's own types leave bfloat16 out."""
    array = constant.numpy().copy()
    if constant.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def base_name(value: ir.Value) -> str:
    """Return the name of the initializer behind a value."""
    node = value.producer()
    while node is not None and node.inputs and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return str(value.name)


def stored_axes(value: ir.Value) -> list[int]:
    """Return how to permute a tensor of the form of `value` to that of the initializer behind it."""
    axes = list(range(len(value.shape or ())))
    node = value.producer()
    while node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        perm = list(node.attributes["perm"].as_ints())
        axes = [axes[perm.index(axis)] for axis in range(len(perm))]
        node = node.inputs[0].producer()
    return axes
