"""The results of a run as text, the most important first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.onnx import summary as onnx
from benchmarks.gpu.run import Record, read_records

SHOWN = ("versions", "packages", "nvidia-smi", "gpu", "precompiled")
CHECKED = ("self_check", "checks", "past")
TOOLS = {"memcheck.txt": "ERROR SUMMARY", "racecheck.txt": "RACECHECK SUMMARY"}


def summary(out: Path) -> str:
    """Return the summary of the records in a folder."""
    records = read_records(out)
    return "\n".join(
        ["=== the kernels on this machine", *about(records), *checks(records), *failures(records), *layers(records),
         *decoding(records), *training(records), *tuning(records), *onnx.lines(records), *tools(out), *kernels(records)]
    )  # fmt: skip


def about(records: list[Record]) -> Iterator[str]:
    """Yield the machine and its ceilings."""
    for record in records:
        if record["what"] in SHOWN:
            yield _fields(record)[:240]
        elif record["stage"] == "env" and "tflops" in record:
            yield f"ceiling {record['what']:<34}{record['tflops']:8.0f} TFLOP/s"
        elif record["stage"] == "env" and "tb_s" in record:
            yield f"ceiling {record['what']:<34}{record['tb_s']:8.2f} TB/s"


def checks(records: list[Record]) -> Iterator[str]:
    """Yield the totals of the checks, and each that is wrong."""
    for record in records:
        if record["stage"] == "check" and (record["what"].startswith(CHECKED) or record.get("ok") is False):
            yield f"{record['what']}: {_fields(record)}"[:230]


def failures(records: list[Record]) -> Iterator[str]:
    """Yield what was raised."""
    for record in records:
        if "failed" in record and record["what"] != "precompiled":
            yield f"FAILED {record['stage']} {record['what']}: {record['failed']}"[:220]


def layers(records: list[Record]) -> Iterator[str]:
    """Yield the times of whole layers, or why there are none."""
    for record in records:
        if "forward_ms" in record:
            forward, both = (_times(record, name) for name in ("forward", "both"))
            yield f"{record['what']:<34}{forward} | with gradients {both} {record.get('peak_gib', 0):6.2f} GiB"
        elif "not_timed" in record:
            yield f"{record['what']:<34}not timed: {record['not_timed'][:120]}"


def decoding(records: list[Record]) -> Iterator[str]:
    """Yield the times of a few tokens, and of a captured step."""
    for record in records:
        if "eager_ms" in record:
            graph, floor = record.get("graph_ms", 0), record.get("floor_ms", 0)
            followed = f"same {record.get('same')}, follows {record.get('follows_routing')}"
            times = f"eager {record['eager_ms']:8.3f} graph {graph:8.3f} floor {floor:7.3f}"
            yield f"{record['what']:<42}{times} {followed}"


def training(records: list[Record]) -> Iterator[str]:
    """Yield the training steps of whole models."""
    for record in records:
        if "step_ms" in record:
            yield (
                f"train {record['what']:<24}{record['step_ms']:8.1f} ms {record['tokens_s']:9.0f} tokens/s "
                f"{record['peak_gib']:6.2f} GiB {record['parameters'] / 1e6:6.0f} M, "
                f"loss {record['first_loss']:.3f} -> {record['last_loss']:.3f}"
            )


def tuning(records: list[Record]) -> Iterator[str]:
    """Yield what tuning gained."""
    for record in records:
        if "gain" in record:
            times = f"{record['table_ms']:8.3f} -> {record['best_ms']:8.3f} ms ({record['gain']:.2f}x)"
            yield f"{record['what']:<38}{times} {record['top'][0]}"


def tools(out: Path) -> Iterator[str]:
    """Yield the last words of NVIDIA's tools."""
    for name, mark in TOOLS.items():
        file = out / name
        if file.exists():
            lines = [line for line in file.read_text(errors="replace").splitlines() if mark in line or "Error" in line]
            yield f"{name}: {lines[-1].strip() if lines else 'no summary line'}"[:200]


def kernels(records: list[Record]) -> Iterator[str]:
    """Yield the times of single kernels."""
    for record in records:
        if record["stage"] == "kernels" and "ms" in record:
            rate = f"{record['tb_s']:6.2f} TB/s" if "tb_s" in record else ""
            if "tflops" in record:
                rate = f"{record['tflops']:6.0f} TFLOP/s {record['of_dense']:4.0%}"
            yield f"{record['what']:<38}{record['ms']:8.3f} ms {rate}"


def _times(record: Record, name: str) -> str:
    rate, share = record[f"{name}_tflops"], record[f"{name}_of_dense"]
    return f"{record[f'{name}_ms']:9.3f} ms {rate:5.0f} TFLOP/s {share:4.0%}"


def _fields(record: Record) -> str:
    return ", ".join(f"{name}={value}" for name, value in record.items() if name not in {"stage", "what"})
