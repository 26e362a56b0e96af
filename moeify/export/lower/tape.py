"""How nodes are built: onnx_ir's tape, with a short way to write a node."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import tape

Attribute = int | float | str | Sequence[int] | ir.TensorProtocol


class Tape(tape.Tape):
    """Records nodes: `tape("Gemm", x, w, transB=1)` adds one and returns its output."""

    def __call__(self, op: str, *inputs: ir.Value | None, domain: str = "", **attributes: Attribute) -> ir.Value:
        """Add a node with one output."""
        return self.op(op, inputs, attributes, domain=domain)

    def several(self, count: int, op: str, *inputs: ir.Value, **attributes: Attribute) -> Sequence[ir.Value]:
        """Add a node with several outputs."""
        return self.op_multi_out(op, inputs, attributes, num_outputs=count)

    def ints(self, values: int | Sequence[int] | Sequence[Sequence[int]]) -> ir.Value:
        """Add an int64 constant."""
        return self("Constant", value=ir.tensor(values, dtype=ir.DataType.INT64))

    def number(self, value: float, dtype: ir.DataType) -> ir.Value:
        """Add a scalar constant."""
        return self("Constant", value=ir.tensor(value, dtype=dtype))

    def zeros(self, shape: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Add zeros of a computed shape."""
        return self("ConstantOfShape", shape, value=ir.tensor([0.0], dtype=dtype))
