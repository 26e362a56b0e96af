"""The report of a training run, from the lines that `moeify.RoutingCallback` wrote."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from moeify import __version__
from moeify.report.about import short
from moeify.report.data import Curve, LoadHistory, Report, Training
from moeify.report.findings import findings
from moeify.training.run_log import LayerWindow, Window, read_run

_POINTS = 150  # of a curve: more windows are averaged
_CELLS, _LEAST, _MOST = 12_000, 4, 60  # of all histories together, and columns of one


def collect_run(path: Path) -> Report:
    """Read a run's log, also one that was cut off.

    Raises:
        CheckpointError: It cannot be read, or holds no window.
    """
    run = read_run(path)
    notes = [f"{path.name} ends in the middle of a line, so the run was stopped while it wrote"] if run.cut else []
    notes += [f"{run.damaged} lines of {path.name} are damaged and were left out"] if run.damaged else []
    report = Report(
        title=f"{path.absolute().parent.name}/{path.name}",
        version=__version__,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        model_type=_kinds(run.windows[-1]),
        notes=tuple(notes),
        training=_training(run.windows),
    )
    return replace(report, findings=findings(report))


def _kinds(last: Window) -> str:
    experts = dict.fromkeys(len(layer.load) for layer in last.layers.values())
    return f"{len(last.layers)} MoE layers of {' or '.join(map(str, experts))} experts"


def _training(windows: Sequence[Window]) -> Training:
    last, groups = windows[-1], _groups(windows, _POINTS)
    measured = [[_measures(window) for window in group] for group in groups]
    names = dict.fromkeys(name for group in measured for numbers in group for name in numbers)
    curves = [Curve(name, tuple(_mean(numbers.get(name) for numbers in group) for group in measured)) for name in names]
    cells = sum(len(layer.load) for layer in last.layers.values())
    columns = _groups(windows, min(max(_CELLS // cells, _LEAST), _MOST))
    loads = [LoadHistory(path, _history(path, len(layer.load), columns)) for path, layer in last.layers.items()]
    ends = [[group[-1].step for group in found] for found in (groups, columns)]
    return Training(tuple(ends[0]), tuple(curves), tuple(ends[1]), tuple(loads), len(windows))


def _measures(window: Window) -> dict[str, float | None]:
    """Return a window's numbers: means over layers, and the sum of experts without a token."""
    layers = list(window.layers.values())
    losses = dict.fromkeys(name for layer in layers for name in layer.losses)
    return {
        "loss": window.loss,
        **{f"{name} loss": _mean(layer.losses.get(name) for layer in layers) for name in losses},
        "entropy": _mean(layer.entropy for layer in layers),
        "busiest expert": _mean(max(layer.load) for layer in layers),
        "experts without a token": sum(times == 0 for layer in layers for times in layer.load),
        "dropped choices": _mean(layer.dropped for layer in layers),
        "logit size": _mean(layer.logit_size for layer in layers),
    }


def _groups(windows: Sequence[Window], most: int) -> list[Sequence[Window]]:
    """Return the windows in at most so many runs of one length."""
    each = math.ceil(len(windows) / most)
    return [windows[start : start + each] for start in range(0, len(windows), each)]


def _history(path: str, experts: int, columns: Sequence[Sequence[Window]]) -> tuple[tuple[float, ...], ...]:
    """Return the mean loads of a layer, a row for each expert; windows that do not know it count as idle."""
    idle = LayerWindow((0.0,) * experts, 0.0, 0.0, 0.0, {})
    loads = [[window.layers.get(path, idle).load for window in column] for column in columns]
    alike = [[load for load in column if len(load) == experts] for column in loads]
    return tuple(tuple(_mean(load[expert] for load in column) or 0.0 for column in alike) for expert in range(experts))


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the finite numbers among some values; None without any."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    return short(sum(found) / len(found)) if found else None
