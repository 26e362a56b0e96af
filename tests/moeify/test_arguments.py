from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moeify
from moeify.arguments import check_config, check_model
from moeify.config import MoEConfig
from moeify.errors import ConfigError, RefusedError

CONFIG = MoEConfig(4, 2)
untyped: Any = moeify
CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "convert": (lambda: untyped.convert("folder", CONFIG), "model is a str: expected a torch.nn.Module; moeify.load"),
    "convert a path": (lambda: untyped.convert(Path("x"), CONFIG), r"moeify.load\('x'\) makes one of a folder"),
    "config": (
        lambda: untyped.convert(nn.Linear(2, 2), {"experts": 4}),
        r"config is a dict: .*MoEConfig\(\*\*config",
    ),
    "a word": (lambda: untyped.convert(nn.Linear(2, 2), "switch"), "config is a str: expected a moeify.MoEConfig"),
    "verify": (lambda: untyped.verify("a", "b"), "dense is a str: expected a torch.nn.Module"),
    "verify one": (lambda: untyped.verify(nn.Linear(2, 2), "b"), "moe is a str"),
    "convert_graph": (
        lambda: untyped.convert_graph(nn.Linear(2, 2), CONFIG),
        "graph is a Linear: .* pass torch.export.export\\(model, args\\), or convert the model in place",
    ),
    "find_ffns": (lambda: untyped.find_ffns(None), "model is a NoneType"),
    "freeze": (lambda: untyped.freeze("folder", "moe"), "model is a str"),
    "routing_stats": (lambda: untyped.routing_stats([]), "model is a list"),
    "aux_loss": (lambda: untyped.aux_loss("folder"), "model is a str"),
    "linearize": (lambda: untyped.linearize("folder"), "model is a str"),
    "stack": (lambda: untyped.stack("folder"), "model is a str"),
    "export_onnx": (lambda: untyped.export_onnx("folder", "model.onnx"), "model is a str"),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_argument_of_another_kind_is_one_line(call: str) -> None:
    use, words = CALLS[call]
    with pytest.raises(ConfigError, match=words) as caught:
        use()
    assert "\n" not in str(caught.value)


def test_an_exported_program_has_a_function_of_its_own() -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    with pytest.raises(ConfigError, match=r"is a ExportedProgram: .*moeify.convert_graph takes an exported program"):
        check_model(program)


def test_what_is_right_passes() -> None:
    check_model(nn.Linear(2, 2))
    check_config(CONFIG)


@pytest.mark.filterwarnings("ignore")  # of PEFT about transformers
@pytest.mark.parametrize("wrapped", [True, False])
def test_adapters_are_merged_first(wrapped: bool) -> None:
    import peft

    from tests.moeify import tiny

    lora: Any = peft.LoraConfig(r=2, target_modules=["q_proj"])
    outside: Any = peft.get_peft_model(tiny.build("llama"), lora)
    with pytest.raises(RefusedError, match="has adapters of PEFT: merge the adapters first"):
        moeify.convert(outside if wrapped else outside.base_model.model, CONFIG)
