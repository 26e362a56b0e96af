"""A few tokens, launched one by one and replayed from a CUDA graph; then a whole training step in a graph.

The floor is the time to read the weights of the chosen experts once. A graph must follow another routing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.candidates import CANDIDATES, Candidate, Inputs
from benchmarks.gpu.layer import Step, captured, make_inputs
from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import DECODE_TOKENS, DECODED, SHAPES, Shape, route, shapes
from benchmarks.gpu.stages.environment import bandwidth

LABELS = ("moeify", "grouped_mm", "transformers")


def stage(run: Run) -> None:
    """Decode with each candidate, then capture a training step of ours."""
    for name, shape in shapes(run.dry, *DECODED).items():
        full = make_inputs(shape._replace(tokens=max(DECODE_TOKENS)), run.device)
        for tokens in DECODE_TOKENS:
            inputs = Inputs(full.x[:tokens], full.ids[:tokens].clone(), full.weights[:tokens], full.up, full.down)
            for label in LABELS:
                if run.left() > 6:
                    what = f"{name}: {tokens} tokens, {label}"
                    run.attempt(what, _decode, run, what, CANDIDATES[label], shape, inputs)
    if not run.dry:
        run.attempt("captured step", _captured_step, run)


def _decode(run: Run, what: str, candidate: Candidate, shape: Shape, inputs: Inputs) -> None:
    bytes_read = len(set(inputs.ids.flatten().tolist())) * 3 * shape.hidden * shape.intermediate * 2
    floor, step = bytes_read / bandwidth(run) / 1e9, Step(candidate, inputs)
    eager = run.milliseconds(step.forward)
    if run.dry:
        run.put(what, eager_ms=eager, floor_ms=floor)
        return
    graph, out = captured(step.forward)
    graph.replay()
    same = torch.equal(out, step.forward())
    kept = inputs.ids.clone()
    first = torch.randint(shape.experts, (len(kept), 1), device=kept.device)
    inputs.ids.copy_((first + torch.arange(shape.top_k, device=kept.device)) % shape.experts)
    graph.replay()
    follows = torch.equal(out, step.forward())
    inputs.ids.copy_(kept)
    graphed = run.milliseconds(graph.replay)
    run.put(what, eager_ms=eager, graph_ms=graphed, floor_ms=floor, same=same, follows_routing=follows)


def _captured_step(run: Run) -> None:
    """Capture a forward and a backward pass, and replay them with another routing."""
    shape = SHAPES["Qwen3-30B-A3B"]._replace(tokens=4096)
    inputs = make_inputs(shape, run.device)
    step = Step(CANDIDATES["moeify"], inputs)
    eager = run.milliseconds(step.both)
    graph, got = captured(step.both)
    inputs.ids.copy_(route(shape._replace(zipf=True), run.device))
    graph.replay()
    want: list[Tensor] = step.both()
    same = all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    run.put("captured step", eager_ms=eager, graph_ms=run.milliseconds(graph.replay), same=same)
