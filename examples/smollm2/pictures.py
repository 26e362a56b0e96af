"""The table and the pictures of the runs' records."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from examples import small_lm as lm

Record = dict[str, Any]
TOP = 2.65  # the first steps are alike in all runs, and would hide the rest
HEADER = ("model", "parameters", "steps", "CPU seconds a step", "loss at its start", "at equal tokens", "at equal time")


def table(records: list[Record]) -> tuple[tuple[str, ...], list[list[str]]]:
    """The runs of one seed: each at the last step that all made, and at the last second that all had."""
    step = min(record["points"][-1]["step"] for record in records)
    seconds = min(record["points"][-1]["seconds"] for record in records)
    rows = [
        [
            record["variant"], f"{record['parameters'] / 1e6:.0f} M", str(record["points"][-1]["step"]),
            f"{record['points'][-1]['a step']:.2f}", f"{record['points'][0]['loss']:.3f}",
            f"{value_at(record, 'step', step):.3f} (step {step})",
            f"{value_at(record, 'seconds', seconds):.3f} ({seconds / 60:.0f} min)",
        ]
        for record in records
    ]  # fmt: skip
    return HEADER, rows


def value_at(record: Record, axis: str, x: float) -> float:
    """The loss where an axis has a value, between the two points around it."""
    points = record["points"]
    after = next(i for i, point in enumerate(points) if point[axis] >= x)
    right, left = points[after], points[max(after - 1, 0)]
    share = (x - left[axis]) / (right[axis] - left[axis]) if right is not left else 0.0
    return float(left["loss"] + share * (right["loss"] - left["loss"]))


def loss_picture(records: list[Record], path: Path) -> None:
    """Held-out loss against tokens and against CPU time, one line for each run."""
    seeds = sorted({record["seed"] for record in records})
    panels = [("thousand tokens", "tokens", 1e3), ("CPU minutes of one thread", "seconds", 60.0)]
    drawn = [
        (label, [
            (f"{record['variant']}, seed {record['seed']}",
             [point[axis] / unit for point in record["points"]], [point["loss"] for point in record["points"]])
            for record in records
        ])
        for label, axis, unit in panels
    ]  # fmt: skip
    args = argparse.Namespace(seed=" and ".join(map(str, seeds)), quick=False)
    lm.plot(path, args, *drawn, y="held-out loss, nats per token", top=TOP)


def load_picture(record: Record, path: Path) -> None:
    """Load of each layer's experts on held-out text over the steps; 1 is an equal share."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = record["points"]
    layers = list(points[0]["load"])
    experts = len(points[0]["load"][layers[0]])
    columns = [[share * experts for layer in layers for share in point["load"][layer]] for point in points]
    figure, axes = pyplot.subplots(figsize=(7.5, 7.5))
    end = points[-1]["step"]
    image = axes.imshow(list(zip(*columns, strict=True)), aspect="auto", cmap="RdBu_r", vmin=0, vmax=2,
                        extent=(0, end, len(layers) * experts, 0), interpolation="nearest")  # fmt: skip
    axes.set_yticks([experts * (i + 0.5) for i in range(len(layers))], [name.split(".")[2] for name in layers])
    for i in range(1, len(layers)):
        axes.axhline(experts * i, color="black", linewidth=0.6)
    axes.set_xlabel("step")
    axes.set_ylabel(f"layer, a row for each of its {experts} experts")
    figure.colorbar(image, label="share of the choices, 1 is an equal share")
    axes.set_title(f"seed {record['seed']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
