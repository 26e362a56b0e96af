from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from moeify.errors import ConfigError, MoeifyError
from moeify.export.lower.standard import lower_standard
from moeify.runtime import session
from moeify.runtime.session import check_runtime, open_session
from tests.moeify.export.lower.layer_graph import Layer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model = Layer().graph()
    lower_standard(model)
    ir.save(model, tmp_path / "layer.onnx")
    return tmp_path / "layer.onnx"


def test_a_session_has_the_provider_that_was_asked_for(path: Path) -> None:
    assert open_session(path, provider="cpu", threads=1).get_providers()[0] == "CPUExecutionProvider"
    assert open_session(path).get_providers()[0] == "CPUExecutionProvider"


def test_a_provider_that_is_not_here_is_refused_with_what_to_install(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no CUDAExecutionProvider: .* \(onnxruntime-gpu for cuda\)"):
        open_session(path, provider="cuda")


def test_a_provider_that_nobody_knows_is_refused_with_those_that_there_are(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"provider is 'tpu': expected one of .*cpu, .*cuda, .*openvino"):
        open_session(path, provider="tpu")


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no model")
    with pytest.raises(MoeifyError, match=r"^onnxruntime .* does not load .*x\.onnx \([^\n]+\)$"):
        open_session(tmp_path / "x.onnx")


def fake_runtime(*providers: str) -> Any:
    """ONNX Runtime on a machine where CUDA is listed, and falls back."""
    return SimpleNamespace(
        __version__="1.24.0",
        get_all_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        SessionOptions=SimpleNamespace,
        InferenceSession=lambda *_, **__: SimpleNamespace(get_providers=lambda: list(providers)),
    )


def test_a_provider_that_falls_back_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "import_module", lambda _: fake_runtime("CPUExecutionProvider"))
    with pytest.raises(ConfigError, match="CUDAExecutionProvider does not work on this machine: onnxruntime fell back"):
        open_session(path, provider="cuda")
    open_session(path)  # any will do


def test_onnxruntime_that_is_missing_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(session, "import_module", missing)
    with pytest.raises(MoeifyError, match="needs onnxruntime: pip install onnxruntime, or onnxruntime-gpu"):
        open_session(path)


@pytest.mark.parametrize(
    ("installed", "enough"), [("1.24.0", True), ("1.100.2", True), ("2.0", True), ("1.23.9", False)]
)
def test_versions_are_numbers(installed: str, enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "runtime_version", lambda: installed)
    if enough:
        check_runtime((1, 24))
    else:
        with pytest.raises(MoeifyError, match=r"is too old: 1\.24 or newer is needed; pip install -U onnxruntime"):
            check_runtime((1, 24))
