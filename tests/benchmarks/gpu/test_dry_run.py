"""Every stage on a machine without a GPU, as its owner would try it: `python -m benchmarks.gpu --dry`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.plan import GROUPS, STAGES
from benchmarks.gpu.run import Record, read_records

ROOT = Path(__file__).resolve().parents[3]


def dry_run(out: Path, *stages: str) -> list[Record]:
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--dry",
        "--out",
        out,
        "--seconds",
        "300",
        *stages,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = read_records(out)
    assert [record for record in records if record.get("failed")] == []
    assert [record for record in records if record.get("ok") is False] == []
    assert (out / "summary.txt").read_text().strip()[:11000] in done.stdout
    return records


def test_the_kernels(tmp_path: Path) -> None:
    records = dry_run(tmp_path)
    run = [name for name in GROUPS["kernels"] if not STAGES[name].tool] + ["warm", "warm_tiles"]
    assert {record["stage"] for record in records if record["what"] == "stage ended"} == set(run)
    checks = next(record for record in records if record["what"] == "checks")
    assert (checks["done"], checks["planned"], checks["bad"]) == (4, 4, 0)
    timed = {record["what"] for record in records if record["stage"] == "layers" and "both_ms" in record}
    assert {f"tiny: {name}" for name in ("moeify", "grouped_mm", "loop", "transformers")} <= timed
    assert sum("eager_ms" in record and record["stage"] == "decode" for record in records) == 4 * 3
    right = [record.get("ok") for record in records if record["stage"] == "quantized" and "eager_ms" in record]
    assert right == [None, None, True, True, True, True]
    assert sum("step_ms" in record for record in records) == 5
    assert sum(record["stage"] == "kernels" and "ms" in record for record in records) == 7


def test_exported_files(tmp_path: Path) -> None:
    records = dry_run(tmp_path, "onnx")
    assert {record["stage"] for record in records if record["what"] == "stage ended"} == set(GROUPS["onnx"])
    assert sum(record["what"] == "compared" for record in records) == 2 * 2
    assert [record["equal"] for record in records if record["what"] == "graph"] == [True, True]
    decoders = {record["decoder"] for record in records if record["what"] == "decoder"}
    assert "torch mixtral torch.float32" in decoders
