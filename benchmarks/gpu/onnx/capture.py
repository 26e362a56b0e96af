"""CUDA graphs of exported models: captured, replayed with other inputs, and compared with a plain session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.onnx.models import is_decoder, one_more_token, text_inputs
from benchmarks.gpu.onnx.sessions import Bound, milliseconds, open_session
from benchmarks.gpu.run import Run
from moeify.measure import relative_difference

BATCH, PAST, LENGTH = 2, 16, 32


def capture(run: Run, path: Path) -> None:
    """Capture a model as a CUDA graph, replay it with other inputs, and compare with a plain session."""
    plain = open_session(run, path)
    session = open_session(run, path, graph=True)

    def inputs(seed: int) -> Any:
        decoder = is_decoder(plain)
        return one_more_token(run, plain, BATCH, PAST, seed) if decoder else text_inputs(BATCH, LENGTH, 0, seed)

    replayed, direct = Bound(run, session, inputs(1)), Bound(run, plain, inputs(1))
    for _ in range(3):  # the first runs allocate, one captures
        replayed.run()
    worst = 0.0
    for seed in (2, 3):
        for bound in (replayed, direct):
            bound.fill(inputs(seed))
        first, second = replayed.run(), direct.run()
        worst = max(worst, *(relative_difference(first[name], second[name]) for name in first))
    run.put(
        "graph", difference=worst, equal=worst == 0,
        replay_ms=milliseconds(run.device, replayed.run), plain_ms=milliseconds(run.device, direct.run),
    )  # fmt: skip
