"""The results of exported files as text."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu.onnx.plan import JOBS
from benchmarks.gpu.run import Record


def lines(records: list[Record]) -> Iterator[str]:
    """Yield a line for each model, each layer and each decoder; nothing if there are none."""
    if any(record["stage"].startswith("onnx_") for record in records):
        yield from models(records)
        yield from tables(records)


def models(records: list[Record]) -> Iterator[str]:
    """Yield, for each model, its comparisons, where its experts ran, and its graph."""
    for name in JOBS:
        mine = [record for record in records if record["stage"] == name]
        compared = [record for record in mine if record["what"] == "compared"]
        found = {record["what"]: record for record in mine if "failed" not in record}
        if not mine:
            yield f"{name:<34}not run"
            continue
        right = f"{sum(record['ok'] for record in compared)}/{len(compared)} right"
        worst = max((record["ort"]["rms"] for record in compared), default=float("nan"))
        own = max((record["torch"]["rms"] for record in compared if "torch" in record), default=float("nan"))
        yield f"{name:<34}{right:<11} off by {worst:.1e} (torch {own:.1e}) {_where(found)} {_graph(found)}"


def tables(records: list[Record]) -> Iterator[str]:
    """Yield the milliseconds of layers and decoders."""
    for record in records:
        if "ms" in record and record["what"] in {"layer", "decoder"}:
            label = record.get("decoder") or f"{record['layer']}: {record['form']}"
            yield f"{label:<56}" + "  ".join(f"{size}: {ms:.3f} ms" for size, ms in record["ms"].items())


def _where(found: dict[str, Record]) -> str:
    where = found.get("where", {})
    if "experts" not in where:
        return ""
    placed = ", ".join(f"{count:g} {place}" for place, count in where["experts"].items())
    return f"{placed}; {where['memcpy']:g} copies, {sum(where['on_cpu'].values()):g} nodes on the CPU;"


def _graph(found: dict[str, Record]) -> str:
    graph = found.get("graph")
    if graph is None:
        return "no graph"
    same = "equal" if graph["equal"] else f"differs by {graph['difference']:.1e}"
    return f"graph {same}, {graph['replay_ms']:.3f} ms (plain {graph['plain_ms']:.3f} ms)"
