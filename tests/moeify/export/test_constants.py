from __future__ import annotations

import onnx_ir as ir
import torch
from moeify.export.constants import ConstantReader


def test_a_folded_constant_may_be_in_bfloat16() -> None:
    """Weights that the model transposes are folded to arrays, of a type that torch does not read."""
    weight = torch.randn(3, 5).bfloat16()
    array = ir.tensor(weight.float().numpy(), name="w").numpy().astype(ir.DataType.BFLOAT16.numpy())
    value = ir.Value(name="w", const_value=ir.tensor(array, name="w"))
    reader = ConstantReader(ir.Graph([], [], nodes=[], initializers=[value]))
    assert torch.equal(reader.tensor(value), weight)
