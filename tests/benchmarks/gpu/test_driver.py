"""The driver: limits, NVIDIA's tools, what is skipped; and what a record keeps of a failure."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import Driver, main
from benchmarks.gpu.plan import GROUPS, STAGES, Stage
from benchmarks.gpu.run import Run, read_records
from benchmarks.gpu.stage import run_here
from benchmarks.gpu.summary import summary


def driver(out: Path, seconds: float = 60, dry: bool = False) -> Driver:
    return Driver(out, time.time() + seconds, dry)


def test_every_stage_has_a_place_and_a_limit() -> None:
    named = {name for group in GROUPS.values() for name in group} | {stage.beside for stage in STAGES.values()}
    assert named - {""} == set(STAGES)
    assert all(0 < stage.seconds <= 120 for stage in STAGES.values())


def test_a_stage_is_stopped_at_its_limit_with_what_it_started(tmp_path: Path) -> None:
    started, left = time.time(), tmp_path / "left"
    driver(tmp_path).run(Stage("sleepy", 1, "", tool=("bash", "-c", f"(sleep 3; touch {left}) & sleep 60")))
    assert time.time() - started < 5
    assert "sleepy ended with its limit of 1 s" in (tmp_path / "log.txt").read_text()
    time.sleep(3)
    assert not left.exists()


def test_the_output_of_a_tool_and_its_environment(tmp_path: Path) -> None:
    stage = Stage("tool", 9, "", tool=("bash", "-c", "echo $WHO; exit 3"), environment=(("WHO", "me"),))
    driver(tmp_path).run(stage)
    assert (tmp_path / "tool.txt").read_text() == "me\n"
    assert "tool ended with 3" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("seconds", "dry", "tool", "reason"),
    [
        (5, False, (), "skipped: 5 s left"),
        (60, True, ("bash",), "skipped: no bash here"),
        (60, False, ("no-such-tool",), "skipped: no no-such-tool here"),
    ],
)
def test_what_is_skipped_is_said(
    seconds: float, dry: bool, tool: tuple[str, ...], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver(tmp_path, seconds + 0.4, dry).run(Stage("x", 9, "no.such", tool=tool))
    assert reason in capsys.readouterr().out
    assert read_records(tmp_path) == []


def test_a_failure_is_a_record_and_nothing_more(tmp_path: Path) -> None:
    run_here(Stage("broken", 9, "stages.environment.no_such"), tmp_path, time.time() + 9, dry=True)
    failed, ended = read_records(tmp_path)
    assert failed["failed"].startswith("AttributeError: ") and "stage.py" in failed["where"]
    assert ended["what"] == "stage ended"
    assert "FAILED broken broken: AttributeError" in summary(tmp_path)


def test_a_result_is_handed_on_and_a_failed_one_is_none(tmp_path: Path) -> None:
    run = Run("x", tmp_path, time.time() + 9, dry=True)
    assert run.attempt("right", max, 3, 4) == 4
    assert run.attempt("wrong", int, "a") is None
    (record,) = run.records()
    assert (record["stage"], record["what"]) == ("x", "wrong") and record["failed"].startswith("ValueError: ")


def test_a_stage_that_does_not_exist_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--dry", "--out", str(tmp_path), "nothing"])
    assert "no stage 'nothing': expected some of kernels, onnx, env" in capsys.readouterr().err


def test_the_summary_of_what_a_gpu_writes(tmp_path: Path) -> None:
    def put(stage: str, what: str, **fields: object) -> None:
        Run(stage, tmp_path, 0, dry=True).put(what, **fields)

    put("env", "dense bf16", ms=1.0, tflops=800.0)
    put("check", "experts x", ok=False, worst=0.5)
    times = {f"{name}_{unit}": 2.0 for name in ("forward", "both") for unit in ("ms", "tflops", "of_dense")}
    put("layers", "Mixtral: moeify", **times, peak_gib=3.0)
    put("layers", "Mixtral: Liger", not_timed="wrong output")
    put("decode", "1 token", eager_ms=0.2, graph_ms=0.1, floor_ms=0.05, same=True, follows_routing=True)
    put("tune", "tuned up", gain=1.2, table_ms=1.2, best_ms=1.0, top=["128x64"])
    put("kernels", "Mixtral: up", ms=1.0, tflops=400.0, of_dense=0.5)
    (tmp_path / "memcheck.txt").write_text("x\n========= ERROR SUMMARY: 0 errors\n")
    text = summary(tmp_path)
    for line in (
        "ceiling dense bf16", "experts x: ok=False", "Mixtral: moeify", "3.00 GiB", "Mixtral: Liger", "wrong output",
        "follows True", "(1.20x) 128x64", "memcheck.txt: ========= ERROR SUMMARY: 0 errors", "400 TFLOP/s  50%",
    ):  # fmt: skip
        assert line in text
