from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import page as module
from benchmarks.gpu.page import PAGE, RECORDS, main, page
from benchmarks.gpu.run import Run, read_records


def results(folder: Path, **versions: Any) -> Path:
    folder.mkdir()
    env, layers = (Run(stage, folder, 0, dry=False) for stage in ("env", "layers"))
    env.put("versions", torch="2.11", commit="abc1234", **versions)
    env.put("gpu", name="NVIDIA X100", sms=1)
    times = {f"{name}_{unit}": 2.0 for name in ("forward", "both") for unit in ("ms", "tflops", "of_dense")}
    layers.put("Mixtral: moeify", **times)
    return folder


def test_the_page_in_the_repository_is_that_of_its_records() -> None:
    assert PAGE.read_text() == page(read_records(RECORDS.parent, RECORDS.name)), "run python -m benchmarks.gpu.page"


def test_nothing_measured_is_said_with_how_to_measure() -> None:
    assert "Not measured yet" in page([]) and "bash benchmarks/gpu/run.sh" in page([])


def test_a_run_becomes_records_and_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECORDS", tmp_path / "gpu.jsonl")
    monkeypatch.setattr(module, "PAGE", tmp_path / "gpu.md")
    main([str(results(tmp_path / "run", dry=False))])
    text = (tmp_path / "gpu.md").read_text()
    assert "On NVIDIA X100, of commit abc1234." in text and "Mixtral: moeify" in text and "Not measured" not in text
    main([])
    assert (tmp_path / "gpu.md").read_text() == text, "from the records alone"


@pytest.mark.parametrize("versions", [{"dry": True}, {}])
def test_a_dry_run_is_no_measurement(
    versions: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RECORDS", tmp_path / "gpu.jsonl")
    with pytest.raises(SystemExit, match="not of a GPU"):
        main([str(results(tmp_path / "run", **versions))])
    assert not (tmp_path / "gpu.jsonl").exists()
