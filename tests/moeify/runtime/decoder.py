"""The smallest ONNX file that is a causal language model with keys and values, built by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from moeify.runtime.text import END_IDS, NEEDS, TOKENIZER

WORDS = 5
WORD_LEVEL = (
    '{"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, '
    '"model": {"type": "WordLevel", "vocab": {%s}, "unk_token": "w0"}}'
)
TOKENIZER_JSON = WORD_LEVEL % ", ".join(f'"w{i}": {i}' for i in range(WORDS))


def decoder(heads: int | str = 2, size: int | str = 4, **metadata: str) -> onnx.ModelProto:
    """A model that says word i + 1 after word i, and fails after the last; its keys are handed on as they are.

    Args:
        heads: Declared heads of the keys; a word stands for a size that is known later.
        size: Numbers of a head.
        metadata: Entries to replace: tokenizer, ends, needs.
    """
    float32, int64, keys = TensorProto.FLOAT, TensorProto.INT64, [1, heads, "past", size]
    table = numpy_helper.from_array(np.eye(WORDS, WORDS + 1, 1, dtype=np.float32), "table")
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["logits"]),
            helper.make_node("Identity", ["past_key_values.0.key"], ["present.0.key"]),
        ],
        "decoder",
        [
            helper.make_tensor_value_info("input_ids", int64, ["batch", "tokens"]),
            helper.make_tensor_value_info("past_key_values.0.key", float32, keys),
        ],
        [
            helper.make_tensor_value_info("logits", float32, ["batch", "tokens", WORDS + 1]),
            helper.make_tensor_value_info("present.0.key", float32, None),
        ],
        [table],
    )
    proto: Any = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    entries = {"tokenizer": TOKENIZER_JSON, "ends": "4", "needs": "1.20", **metadata}
    names = {"tokenizer": TOKENIZER, "ends": END_IDS, "needs": NEEDS}
    helper.set_model_props(proto, {names[key]: value for key, value in entries.items()})
    model: onnx.ModelProto = proto
    return model
