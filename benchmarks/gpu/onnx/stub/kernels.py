"""Print the standard operators that ONNX defines in bfloat16 and this onnxruntime-gpu has no kernel for, as JSON."""

from __future__ import annotations

import json
from typing import Any

import onnx
import onnxruntime
from onnx import helper

OPSET = 20
HALF = "tensor(bfloat16)"
OTHERS = ("tensor(int64)", "tensor(bool)", "tensor(float)")
NUMBERS = {HALF: 16, "tensor(int64)": 7, "tensor(bool)": 9, "tensor(float)": 1}
VALUES = {"INT": 1, "INTS": [0], "FLOAT": 1.0, "STRING": "x", "FLOATS": [1.0]}


def one_node(schema: Any) -> bytes | None:
    """Return a graph of one operator that reads bfloat16; None for one that does not, or that needs more."""
    allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    chosen: dict[str, str | None] = {}
    formals = schema.inputs[: max(schema.min_input, 1)]
    for formal in formals:
        able = allowed.get(formal.type_str, [formal.type_str])
        chosen.setdefault(formal.type_str, HALF if HALF in able else next((k for k in OTHERS if k in able), None))
    kinds = [chosen[formal.type_str] for formal in formals]
    if HALF not in kinds or None in kinds:
        return None
    attributes: dict[str, Any] = {n: VALUES.get(a.type.name) for n, a in schema.attributes.items() if a.required}
    names = [f"x{place}" for place in range(len(kinds))]
    outputs = [f"y{place}" for place in range(max(1, schema.min_output))]
    node = helper.make_node(schema.name, names, outputs, **attributes)
    inputs = [helper.make_tensor_value_info(n, NUMBERS[str(k)], None) for n, k in zip(names, kinds, strict=True)]
    graph = helper.make_graph([node], "one", inputs, [helper.make_empty_tensor_value_info(name) for name in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    serialized: bytes = model.SerializeToString()
    return serialized


def lacks_kernel(model: bytes) -> bool:
    """Whether no provider has a kernel for a graph of one node."""
    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model, options, providers=["CUDAExecutionProvider"], enable_fallback=0)
    except Exception as error:
        return "NOT_IMPLEMENTED" in str(error) or "is not set" in str(error)
    return False


def main() -> None:
    """Try every operator."""
    onnxruntime.set_default_logger_severity(4)
    schemas = []
    for name in sorted({schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}):
        try:
            schemas.append(onnx.defs.get_schema(name, OPSET, ""))
        except onnx.defs.SchemaError:
            continue  # of a later opset
    graphs = {schema.name: one_node(schema) for schema in schemas if schema.inputs and not schema.deprecated}
    print(json.dumps([name for name, graph in graphs.items() if graph is not None and lacks_kernel(graph)]))


if __name__ == "__main__":
    main()
