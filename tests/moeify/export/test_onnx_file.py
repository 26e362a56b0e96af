from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import moeify
from moeify.errors import CheckpointError, ConfigError
from moeify.export import onnx_file
from moeify.export.onnx_file import check_request
from moeify.export.targets import TARGETS
from moeify.runtime import session


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "tpu"}, "target is 'tpu': expected one of cpu, cuda, portable"),
        ({"quantize": "int3"}, "quantize is 'int3': expected one of int8, int4, or None"),
        ({"target": "portable", "quantize": "int8"}, r"portable \(standard operators only\) .* use cpu or cuda"),
        ({"target": "cuda", "quantize": "int8"}, "QMoE on CUDA computes in float16 or bfloat16, .* dtype float16"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        moeify.export_onnx(Net(), tmp_path / "net.onnx", **arguments)


def test_half_precision_is_not_for_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="float16, the target cpu computes in float32: load it with dtype float32"):
        moeify.export_onnx(Net().half(), tmp_path / "net.onnx")
    with pytest.raises(ConfigError, match="float64, the target cuda computes in float32, float16 or bfloat16: "):
        moeify.export_onnx(Net().double(), tmp_path / "net.onnx", "cuda")


def test_one_weight_in_half_precision_makes_a_model_one(tmp_path: Path) -> None:
    model = Net()
    model.linear.bias = nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match="the model is in bfloat16"):
        moeify.export_onnx(model, tmp_path / "net.onnx")


def test_a_request_holds_what_was_asked_for(tmp_path: Path) -> None:
    request = check_request(tmp_path / "x.onnx", "cuda", "int4", None, overwrite=False)
    assert (request.dtype, request.runtime) == ("float16", "1.31")
    assert request.form is TARGETS["cuda"].forms["int4"]
    assert check_request(tmp_path / "x.onnx", "portable", None, None, overwrite=False).dtype == "float32"


def test_an_existing_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        moeify.export_onnx(Net(), path, example_inputs={"x": torch.randn(4, 3, 7)})
    with pytest.raises(CheckpointError, match="is a folder: name the file"):
        moeify.export_onnx(Net(), tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="exists"):
        moeify.export_onnx(Net(), "~/net.onnx", example_inputs={"x": torch.randn(4, 3, 7)})
    assert path.read_text() == "mine"
    moeify.export_onnx(Net(), path, example_inputs={"x": torch.randn(4, 3, 7)}, overwrite=True)
    onnx.load(path)


def test_a_missing_package_and_an_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "runtime_version", lambda: "1.22.1")
    with pytest.raises(moeify.MoeifyError, match=r"onnxruntime 1\.22\.1 is too old: 1.23 or newer"):
        moeify.export_onnx(Net(), tmp_path / "net.onnx")

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(onnx_file, "import_module", missing)
    with pytest.raises(moeify.MoeifyError, match=r"needs onnx: pip install 'moeify\[onnx\]'"):
        moeify.export_onnx(Net(), tmp_path / "net.onnx")
