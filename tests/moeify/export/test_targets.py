from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import moeify
from moeify.errors import ConfigError
from moeify.export.onnx_file import check_request
from moeify.export.targets import TARGETS, Form, Operator, Target, quantizations
from tests.moeify import tiny
from tests.moeify.command import moeify_command

ENTRY = Target(
    name="board",
    about="a board with a CPU of its own",
    provider="CPUExecutionProvider",
    default_dtype="float32",
    forms={
        None: Form((1, 23), ("float32",), Operator(min_experts=4)),
        "int5": Form((1, 24), ("float32",), Operator(8)),
    },
)  # fmt: skip


@pytest.mark.parametrize(
    ("target", "quantize", "oldest"),
    [
        ("portable", None, (1, 23)), ("cpu", None, (1, 23)), ("cpu", "int8", (1, 24)), ("cpu", "int4", (1, 31)),
        ("cuda", None, (1, 28)), ("cuda", "int8", (1, 28)), ("cuda", "int4", (1, 31)),
    ],
)  # fmt: skip
def test_the_oldest_runtime_that_was_seen_to_compute_a_target_right(
    target: str, quantize: str | None, oldest: tuple[int, int]
) -> None:
    assert TARGETS[target].forms[quantize].runtime == oldest


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_every_entry_fits_together(target: Target) -> None:
    assert None in target.forms and target.default_dtype in target.dtypes
    for quantize, form in target.forms.items():
        assert set(form.dtypes) <= set(target.dtypes)
        operator = form.operator
        assert bool(quantize) == bool(operator and operator.bits)
        if operator is not None:
            assert operator.multiple % (operator.block or 1) == 0
            assert operator.all_attributes.get("expert_weight_bits") == operator.bits


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "board", ENTRY)


class Layer(nn.Module):
    """One FFN, to be converted."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.ffn(x)
        return y


@pytest.mark.parametrize(("experts", "operator"), [(3, "moeify::SparseMoE"), (4, "com.microsoft::MoE")])
def test_one_entry_is_all_that_a_new_target_needs(board: None, tmp_path: Path, experts: int, operator: str) -> None:
    inputs = {"x": torch.randn(4, 3, 6)}
    model = moeify.convert(Layer().eval(), moeify.MoEConfig(experts, 2), example_inputs=inputs)
    report = moeify.export_onnx(model, tmp_path / "layer.onnx", "board", example_inputs=inputs)
    assert report.passed and report.target == "board" and report.operators[operator] == 1


def test_a_new_way_to_store_weights_too(board: None, tmp_path: Path) -> None:
    assert quantizations() == ("int8", "int4", "int5")
    inputs = {"x": torch.randn(4, 3, 6)}
    model = moeify.convert(Layer().eval(), moeify.MoEConfig(3, 2), example_inputs=inputs)
    report = moeify.export_onnx(model, tmp_path / "layer.onnx", "board", "int5", example_inputs=inputs)
    assert report.passed and report.requires == "1.24" and report.operators["com.microsoft::QMoE"] == 1
    with pytest.raises(ConfigError, match=r"the target cpu .* cannot store weights in int5: use board$"):
        check_request(tmp_path / "x.onnx", "cpu", "int5", None, overwrite=False)
    with pytest.raises(ConfigError, match="the target board computes in float32: load it with dtype float32"):
        check_request(tmp_path / "x.onnx", "board", None, "float16", overwrite=False)


def test_the_command_line_knows_a_new_target(board: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny._LLAMA, "num_hidden_layers", 1)
    source = tiny.save(tiny.build("llama"), tmp_path / "src")
    arguments = ["export", source, tmp_path / "x.onnx", "--target", "board", "--preset", "mixtral", "--experts", 4]
    result = moeify_command(*arguments, "--layers", "0", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["target"] == "board"


def test_reading_the_table_loads_neither_torch_nor_onnx() -> None:
    code = "import sys, moeify.export.targets; print({'torch', 'onnx', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
