from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from moeify.errors import ConfigError, MoeifyError
from moeify.runtime import session
from moeify.runtime.session import check_runtime, open_session, runtime_version


@pytest.fixture
def doubled(tmp_path: Path) -> Path:
    """A file that adds its input to itself."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "doubled", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "doubled.onnx")
    return tmp_path / "doubled.onnx"


def test_a_file_runs_on_the_provider_that_was_asked_for(doubled: Path) -> None:
    opened = open_session(doubled, provider="cpu", threads=1)
    assert opened.get_providers() == ["CPUExecutionProvider"]
    assert opened.run(None, {"x": np.array([1, 2, 3], "float32")})[0].tolist() == [2, 4, 6]


def test_a_provider_that_nobody_knows_is_refused_with_those_that_are_known(doubled: Path) -> None:
    with pytest.raises(ConfigError, match=r"provider is 'gpu': expected one of .*cpu.*cuda"):
        open_session(doubled, provider="gpu")


def test_a_provider_that_is_not_installed_is_named(doubled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ConfigError, match="this onnxruntime has no CUDAExecutionProvider"):
        open_session(doubled, provider="cuda")


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(MoeifyError, match=r"does not load .*text\.onnx") as caught:
        open_session(tmp_path / "text.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("installed", "minimum", "enough"), [("1.31.1", (1, 31), True), ("1.9.0", (1, 23), False)])
def test_versions_are_compared_as_numbers(
    monkeypatch: pytest.MonkeyPatch, installed: str, minimum: tuple[int, ...], enough: bool
) -> None:
    monkeypatch.setattr(session, "runtime_version", lambda: installed)
    if enough:
        check_runtime(minimum)
        return
    with pytest.raises(MoeifyError, match=r"onnxruntime 1\.9\.0 is too old: 1\.23 or newer is needed"):
        check_runtime(minimum)


def test_the_version_is_the_installed_one() -> None:
    assert runtime_version() == onnxruntime.__version__


def test_running_a_file_does_not_import_torch() -> None:
    code = "import sys, moeify.runtime.text; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
