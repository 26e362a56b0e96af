from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.gpu.onnx import summary
from benchmarks.gpu.onnx.pool import run_all
from benchmarks.gpu.run import Run, read_records

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # from Python 3.12 on, with threads


def job(run: Run, name: str) -> None:
    if name == "raises":
        raise ValueError("no")
    if name == "dies":
        os._exit(7)
    if name == "hangs":
        time.sleep(60)
    run.put("done", by=os.getpid())


def test_each_job_costs_its_own_results_alone(tmp_path: Path) -> None:
    run, started = Run("pool", tmp_path, time.time() + 14, dry=False), time.time()
    assert run_all(run, ["a", "raises", "dies", "hangs", "b"], 2, job) == []
    assert time.time() - started < 14
    records = read_records(tmp_path)
    assert {record["stage"] for record in records if record["what"] == "done"} == {"a", "b"}
    failed = {f"{record['stage']} {record['what']}": record["failed"] for record in records if "failed" in record}
    assert failed == {"raises job": "ValueError: no", "pool dies": "ended with 7", "pool hangs": "ended with -9"}


def test_what_there_is_no_time_for_is_returned(tmp_path: Path) -> None:
    assert run_all(Run("pool", tmp_path, time.time() + 5, dry=False), ["a"], 2, job) == ["a"]


def test_the_summary_of_a_model(tmp_path: Path) -> None:
    def put(stage: str, what: str, **fields: object) -> None:
        Run(stage, tmp_path, 0, dry=False).put(what, **fields)

    assert list(summary.lines(read_records(tmp_path))) == []
    put("onnx_pool", "pool")
    name = "mixtral-cuda-float16"
    put(name, "compared", ok=True, ort={"rms": 1e-3}, torch={"rms": 2e-3})
    put(name, "compared", ok=False, ort={"rms": 4e-3})
    put(name, "where", experts={"MoE@CUDA": 4.0}, memcpy=0.0, on_cpu={"Shape": 2.0})
    put(name, "graph", equal=False, difference=1e-3, replay_ms=0.1, plain_ms=0.2)
    put("onnx_layers", "layer", layer="small", form="MoE", ms={1: 0.5, 8: 0.6})
    first, *rest = summary.lines(read_records(tmp_path))
    assert "1/2 right" in first and "off by 4.0e-03 (torch 2.0e-03) 4 MoE@CUDA; 0 copies, 2 nodes" in first
    assert first.endswith("graph differs by 1.0e-03, 0.100 ms (plain 0.200 ms)")
    assert rest[0].endswith("not run")
    assert rest[-1].split() == ["small:", "MoE", "1:", "0.500", "ms", "8:", "0.600", "ms"]
