"""ONNX files for `moeify run`: damaged, odd, or large."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import onnx
from onnx import TensorProto

from tests.fuzz.damage import files
from tests.moeify.runtime.decoder import WORD_LEVEL, decoder

ODD_TEXT = ("", "x", "1.x", "-1", "9" * 5000, "1.2.3.4", "99.0", "2 x", "\x1b[1m", "4 4 4", "1e3")


def entries(rng: Random, path: Path) -> str:
    tokenizers = ("", "{", "[" * 100_000, WORD_LEVEL % "", WORD_LEVEL % '"w0": 7777', WORD_LEVEL % '"\\u001b[1m": 1')
    key = rng.choice(("tokenizer", "ends", "needs"))
    value = rng.choice(tokenizers if key == "tokenizer" else ODD_TEXT)
    onnx.save(decoder(**{key: value}), path)
    return f"{key} is {value[:40]!r}"


def states(rng: Random, path: Path) -> str:
    sizes = ("heads", 0, 1, 2**16, 2**17, 2**40, 2**62)
    heads, size = rng.choice(sizes), rng.choice(sizes)
    onnx.save(decoder(heads, size), path)
    return f"{heads} heads of {size}"


def graph(rng: Random, path: Path) -> str:
    """Another output, input, type or operator."""
    proto: Any = decoder()
    kinds = ("no logits", "no present", "float16", "int64", "other input", "unknown operator", "outside data")
    said = rng.choice(kinds)
    match said:
        case "no logits":
            proto.graph.node[0].output[0] = "other"
            proto.graph.output[0].name = "other"
        case "no present":
            del proto.graph.output[1]
        case "float16" | "int64":
            kind = TensorProto.FLOAT16 if said == "float16" else TensorProto.INT64
            proto.graph.input[1].type.tensor_type.elem_type = kind
            proto.graph.output[1].type.tensor_type.elem_type = kind
        case "other input":
            proto.graph.input[0].name = proto.graph.node[0].input[1] = "pixels\nError: x"
        case "unknown operator":
            proto.graph.node[1].op_type = "Evil\x1b[1m"
        case _:
            table = proto.graph.initializer[0]
            table.ClearField("raw_data")
            table.data_location = TensorProto.EXTERNAL
            entry = table.external_data.add()
            entry.key, entry.value = "location", rng.choice(("../foreign.txt", "/etc/passwd", "none", "src.onnx"))
    onnx.save(proto, path)
    return said


def damaged(rng: Random, path: Path) -> str:
    return rng.choice((files.of_bytes, files.of_bytes, files.in_its_place))(rng, path)
