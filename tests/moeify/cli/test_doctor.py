from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from moeify.cli.doctor import _tiles
from moeify.kernels.gpu import target, tuned_tiles
from moeify.kernels.gpu.tiles import Tile
from moeify.kernels.tools import selfcheck, tuning
from tests.moeify.command import moeify_command


def test_a_healthy_machine_passes() -> None:
    result = moeify_command("doctor", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert result.stdout == json.dumps(report, indent=2) + "\n"  # to be read, too
    assert report["failed"] == [] and report["worst"].keys() == {"float32", "float16", "bfloat16"}
    if not torch.cuda.is_available():
        assert report["checked"] == "the CPU path; the Triton kernels need a GPU"
    assert report["torch"] == torch.__version__.split("+")[0] or report["torch"] == torch.__version__


def test_a_package_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    known = metadata.version

    def version(package: str) -> str:
        if package == "onnxruntime":
            raise metadata.PackageNotFoundError(package)
        return known(package)

    monkeypatch.setattr(metadata, "version", version)
    report = json.loads(moeify_command("doctor", "--json").stdout)
    assert (report["onnxruntime"], report["torch"]) == ("not installed", known("torch"))


def test_a_kernel_that_is_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_wrong(device: torch.device, dtype: torch.dtype, difference: Any) -> Iterator[selfcheck.Check]:
        yield selfcheck.Check("experts: output", 0.5 if dtype == torch.float32 else 0.0)

    monkeypatch.setattr(selfcheck, "self_check", one_wrong)
    result = moeify_command("doctor")
    assert result.exit_code == 1
    assert "experts: output in float32: 5.0e-01" in result.stdout


def test_a_check_that_cannot_run_is_a_failure_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device, dtype: torch.dtype, difference: Any) -> Iterator[selfcheck.Check]:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(selfcheck, "self_check", broken)
    result = moeify_command("doctor")
    assert result.exit_code == 1 and "and more" not in result.stdout
    assert "bfloat16 was not checked: RuntimeError: no kernel image" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="tunes on a machine with a GPU")
def test_tuning_needs_a_gpu(tmp_path: Path) -> None:
    result = moeify_command("doctor", "--tune", tmp_path / "tiles.json")
    assert result.exit_code == 1 and "this machine has none: nothing was written" in result.stderr
    assert list(tmp_path.iterdir()) == []


def _pretend_to_have_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(selfcheck, "self_check", lambda device, dtype, difference: [selfcheck.Check("experts", 0.0)])
    monkeypatch.setattr("moeify.cli.doctor._about", lambda device, trouble: {"gpu": "none"})
    monkeypatch.setattr(tuned_tiles, "architecture", lambda: "sm_90")


def test_tuning_writes_the_fastest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow, fast = Tile(16, 64, 128, 4, 3), Tile(16, 32, 128, 4, 3)

    def tune(
        shape: tuning.Shape, device: torch.device, dtypes: Any, shares: Any, **settings: Any
    ) -> Iterator[tuning.Timed]:
        assert shape == tuning.Shape(64, 32, 8, 2) and device.type == "cuda"
        assert (dtypes, shares) == ((torch.bfloat16,), tuning.SHARES[:1])
        assert 0 < settings["until"] - time.time() <= 9 and settings["wrong"](torch.ones(1), torch.ones(1)) == ""
        yield tuning.Timed("rows", 2, fast, {slow: 0.2, fast: 0.1})
        assert tuned_tiles._read(str(file)), "written as it goes"

    _pretend_to_have_a_gpu(monkeypatch)
    monkeypatch.setattr(tuning, "tune", tune)
    file = tmp_path / "tiles.json"
    chosen = ["--tune-seconds", "9", "--tune-dtype", "bfloat16", "--tune-rows", "16"]
    sizes = ["--tune-shape", "64", "32", "8", "2"]
    result = moeify_command("doctor", "--json", "--tune", file, *sizes, *chosen)
    assert result.exit_code == 0 and json.loads(result.stdout)["failed"] == []
    assert "0.100 ms, the table's 0.200 ms" in result.stderr and "with 1 tiles" in result.stderr
    assert tuned_tiles._read(str(file)) == {("rows", 16, 2): fast} and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["t.json"], "tuning failed, .*t.json was not written: RuntimeError: out of memory$"),
        (["no/t.json"], "its folder does not exist"),
        (["t.json", "--tune-shape", "64", "32", "2", "3"], "2 experts and 3 choices"),
    ],
)
def test_tuning_that_cannot_be_done(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def tune(*args: Any, **settings: Any) -> Iterator[tuning.Timed]:
        raise RuntimeError("out of memory\nand more")

    _pretend_to_have_a_gpu(monkeypatch)
    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.chdir(tmp_path)
    result = moeify_command("doctor", "--tune", *arguments)
    assert result.exit_code in (1, 2) and list(tmp_path.iterdir()) == []
    assert re.search(message, result.stderr.strip()), result.stderr


def test_tuning_keeps_what_it_had_and_says_when_it_had_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tile, file = Tile(16, 64, 128, 4, 3), tmp_path / "t.json"

    def tune(*args: Any, **settings: Any) -> Iterator[tuning.Timed]:
        if file.exists():
            return
        yield tuning.Timed("rows", 2, tile, {tile: 0.2})
        raise RuntimeError("lost the device")

    _pretend_to_have_a_gpu(monkeypatch)
    monkeypatch.setattr(tuning, "tune", tune)
    result = moeify_command("doctor", "--tune", file)
    assert result.exit_code == 1 and "t.json has what was found before: RuntimeError: lost" in result.stderr
    assert tuned_tiles._read(str(file)) == {("rows", 16, 2): tile}
    result = moeify_command("doctor", "--tune", file, "--tune-seconds", "7")
    assert result.exit_code == 1 and "no tile was timed in 7 s" in result.stderr


def test_a_driver_that_is_too_old_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def is_available() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old\nand more", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(selfcheck, "self_check", lambda device, dtype, difference: [selfcheck.Check("experts", 0.0)])
    report = json.loads(moeify_command("doctor", "--json").stdout)
    assert report["gpu"].startswith("none that can be used: ") and report["gpu"].endswith("is too old")
    refused = moeify_command("doctor", "--tune", tmp_path / "t.json")
    assert refused.exit_code == 1 and "none that can be used (CUDA initialization" in refused.stderr


def test_the_kernel_to_keep_away_from_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def checks(device: torch.device, dtype: torch.dtype, difference: Any) -> list[selfcheck.Check]:
        if dtype == torch.float16:
            raise RuntimeError("OutOfResources: out of resource: shared memory, Required: 9, Hardware limit: 8")
        bad = 0.5 if dtype == torch.float32 else 0.0
        return [selfcheck.Check("experts 8x2: output", 0.0), selfcheck.Check("experts 8x2: gradient of up_EJH", bad)]

    _pretend_to_have_a_gpu(monkeypatch)
    monkeypatch.setattr(selfcheck, "self_check", checks)
    result = moeify_command("doctor", env={"COLUMNS": "400"})
    assert result.exit_code == 1 and "keep away from the kernel weights in float32: another Triton" in result.stdout
    assert "shared memory, Required: 9, Hardware limit: 8: another Triton" in result.stdout


def test_where_the_tiles_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, said in (("sm_90", "of the table, for sm_90"), ("sm_87", "small ones: the table has none for sm_87")):
        monkeypatch.setattr(target, "architecture", lambda name=name: name)
        assert _tiles().startswith(said)
    monkeypatch.setenv("MOEIFY_TILES", "t.json")
    assert _tiles() == "of t.json, which MOEIFY_TILES names"
