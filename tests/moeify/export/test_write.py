from __future__ import annotations

import errno
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from moeify.errors import CheckpointError
from moeify.export import write
from moeify.export.onnx_file import DATA_SUFFIX
from moeify.export.write import data_file
from moeify.files.staging import staged_file
from tests.moeify.export.lower.layer_graph import Layer

MODEL = Layer().graph()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_weights_of_a_large_model_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.onnx"
    monkeypatch.setattr(write, "_IN_ONE_FILE", 0)
    monkeypatch.setattr(write, "_SMALLEST_OUTSIDE", 16)
    with staged_file(path, overwrite=False, companion=DATA_SUFFIX) as staged:
        write.write(MODEL, staged)
    assert names(tmp_path) == ["x.onnx", "x.onnx.data"]
    weights = onnx.load(path).graph.initializer  # reads the file beside it
    assert all(tensor.raw_data for tensor in weights)
    monkeypatch.undo()
    with staged_file(path, overwrite=True, companion=DATA_SUFFIX) as staged:
        write.write(MODEL, staged)
    assert names(tmp_path) == ["x.onnx"]


def test_what_is_written_again_over_large_weights_holds_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.onnx"
    monkeypatch.setattr(write, "_IN_ONE_FILE", 0)
    write.write(MODEL, path)
    monkeypatch.undo()
    write.write(MODEL, path)
    assert not data_file(path).exists()


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_text("mine")
    with pytest.raises(KeyError), staged_file(path, overwrite=True) as staged:
        write.write(MODEL, staged)
        raise KeyError
    assert names(tmp_path) == ["x.onnx"] and path.read_text() == "mine"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("onnx_ir.save", full)
    message = r"^the disk became full while .*x\.onnx was written: free some space and run again; nothing was left$"
    with pytest.raises(CheckpointError, match=message), staged_file(tmp_path / "x.onnx", overwrite=False) as staged:
        write.write(MODEL, staged)
    assert not names(tmp_path)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match=r"x\.onnx cannot be written: Not a directory"),
        staged_file(tmp_path / "file" / "x.onnx", overwrite=False),
    ):
        pass


def test_a_model_larger_than_the_disk_is_refused_before_it_is_written(tmp_path: Path) -> None:
    class Huge:
        nbytes = 10**18

    huge = Layer().graph()
    value = ir.Value(name="huge")
    value.const_value = Huge()  # type: ignore[assignment]
    huge.graph.initializers["huge"] = value
    with pytest.raises(CheckpointError, match=r"not enough space for x.onnx: 1,000,000,000,000 MB are needed"):
        write.write(huge, tmp_path / "x.onnx")
