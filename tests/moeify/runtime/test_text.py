from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from moeify.errors import MoeifyError
from moeify.runtime.text import END_IDS, NEEDS, Speed, TextModel

VOCABULARY = 7


def counter(path: Path, *, metadata: dict[str, str] | None = None, states: bool = True) -> Path:
    """A "language model" whose next token is the number of tokens that it has seen, modulo its vocabulary.

    It learns that number from its keys alone, so a state that is lost or kept twice shows.
    """
    table = np.eye(VOCABULARY, dtype=np.float32)
    nodes = [
        helper.make_node("Unsqueeze", ["input_ids", "axes"], ["ids"]),
        helper.make_node("Cast", ["ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["past_key_values.0.key", "floats"], ["present.0.key"], axis=2),
        helper.make_node("Shape", ["present.0.key"], ["length"], start=2, end=3),
        helper.make_node("Mod", ["length", "size"], ["next"]),
        helper.make_node("Gather", ["table", "next"], ["row"]),
        helper.make_node("Unsqueeze", ["row", "first"], ["logits"]),
    ]
    constants = {"axes": np.array([1, 3]), "size": np.array([VOCABULARY]), "table": table, "first": np.array([0])}
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "new"])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, VOCABULARY])]
    if states:
        inputs.append(helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, [1, 1, "past", 1]))
        outputs.append(helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, [1, 1, "all", 1]))
    else:
        nodes[2] = helper.make_node("Identity", ["floats"], ["present.0.key"])
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "counter", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, metadata or {})
    onnx.save(model, path)
    return path


def generated(path: Path, prompt: Sequence[int], limit: int) -> list[int]:
    return list(TextModel(path, provider="cpu", threads=1).tokens(prompt, limit))


def test_each_token_sees_all_that_came_before_it(tmp_path: Path) -> None:
    path = counter(tmp_path / "m.onnx")
    assert generated(path, [5, 5, 5], 6) == [3, 4, 5, 6, 0, 1]
    assert generated(path, [1], 3) == [1, 2, 3]


def test_an_end_token_ends_the_text(tmp_path: Path) -> None:
    path = counter(tmp_path / "m.onnx", metadata={END_IDS: "5 6"})
    assert generated(path, [0, 0], 9) == [2, 3, 4]


def test_speed_counts_the_prompt_and_what_came_after_the_first_token(tmp_path: Path) -> None:
    model: Any = TextModel(counter(tmp_path / "m.onnx"), provider="cpu")
    assert len(list(model.tokens([1, 2, 3, 4], 5))) == 5
    assert (model.speed.prompt_tokens, model.speed.new_tokens) == (4, 4)
    assert model.speed.prompt_seconds > 0 and model.speed.new_seconds > 0


def test_speed_is_tokens_over_seconds() -> None:
    assert Speed(8, 2.0, 30, 10.0).summary() == "prompt 4.0 tokens/s (8), generation 3.0 tokens/s (30)"


def test_a_model_without_keys_and_values_is_refused_with_what_it_takes(tmp_path: Path) -> None:
    path = counter(tmp_path / "m.onnx", states=False)
    with pytest.raises(MoeifyError, match=r"no causal language model with keys and values: it takes input_ids"):
        TextModel(path)


def test_a_file_that_needs_a_newer_runtime_says_so(tmp_path: Path) -> None:
    path = counter(tmp_path / "m.onnx", metadata={NEEDS: "99.0"})
    with pytest.raises(MoeifyError, match=r"too old: 99\.0 or newer is needed"):
        TextModel(path)


def test_a_file_without_a_tokenizer_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(MoeifyError, match="carries no tokenizer: export it with `moeify export`"):
        TextModel(counter(tmp_path / "m.onnx")).tokenizer()
