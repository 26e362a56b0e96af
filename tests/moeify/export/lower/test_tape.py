from __future__ import annotations

import onnx_ir as ir

from moeify.export.lower.tape import Tape


def test_nodes_are_recorded_in_order_with_their_attributes() -> None:
    tape, x = Tape(), ir.Value(name="x")
    first, second = tape.several(2, "Split", x, tape.ints([1, 2]), axis=0)
    y = tape("Gemm", first, second, None, transB=1)
    absent = tape("MoE", x, None, domain="com.microsoft")
    assert [node.op_type for node in tape.nodes] == ["Constant", "Split", "Gemm", "MoE"]
    gemm, moe = y.producer(), absent.producer()
    assert gemm is not None and gemm.attributes["transB"].as_int() == 1 and list(gemm.inputs) == [first, second, None]
    assert moe is not None and moe.domain == "com.microsoft"


def test_constants_have_the_dtype_that_is_asked_for() -> None:
    tape = Tape()
    tape.ints(3), tape.number(1.5, ir.DataType.BFLOAT16), tape.zeros(tape.ints([2]), ir.DataType.FLOAT16)
    tensors = [node.attributes["value"].as_tensor() for node in tape.nodes]
    assert [tensor.dtype for tensor in tensors] == [
        ir.DataType.INT64, ir.DataType.BFLOAT16, ir.DataType.INT64, ir.DataType.FLOAT16
    ]  # fmt: skip
    assert [list(tensor.shape) for tensor in tensors] == [[], [], [1], [1]]
