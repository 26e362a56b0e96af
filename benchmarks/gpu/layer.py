"""One layer's experts: its inputs, its time forward and with gradients, its memory, and its graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.candidates import Candidate, Inputs
from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import Shape, route

_cuda: Any = torch.cuda  # for its untyped parts
GIB = 2**30


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    """Return random inputs in bf16, of a size that keeps values near one."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)

    up = randn(shape.experts, 2 * shape.intermediate, shape.hidden).mul_(shape.hidden**-0.5)
    down = randn(shape.experts, shape.hidden, shape.intermediate).mul_(shape.intermediate**-0.5)
    weights = torch.rand(shape.tokens, shape.top_k, generator=generator, device=device).bfloat16()
    return Inputs(randn(shape.tokens, shape.hidden), route(shape, device), weights, up, down)


class Step:
    """A forward pass of a candidate, and one with the gradients of everything but the ids."""

    def __init__(self, candidate: Candidate, inputs: Inputs) -> None:
        stored = candidate.store(inputs.up, inputs.down)
        self._candidate, self._ids = candidate, inputs.ids
        self._leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.weights, *stored)]
        self._grad = torch.randn_like(inputs.x)

    def _run(self) -> Tensor:
        x, weights, *stored = self._leaves
        out: Tensor = self._candidate.run(x, self._ids, weights, *stored)
        return out

    def forward(self) -> Tensor:
        """Compute the output alone."""
        with torch.no_grad():
            return self._run()

    def both(self) -> list[Tensor]:
        """Compute the output and the gradients."""
        out = self._run()
        return [out, *torch.autograd.grad(out, self._leaves, self._grad)]


def timed(run: Run, candidate: Candidate, shape: Shape, inputs: Inputs, dense: float) -> dict[str, float]:
    """Return milliseconds, TFLOP/s and their share of a dense product's, and the peak of the memory.

    TFLOP/s count useful products: three projections forward, and twice as many backward.
    """
    step = Step(candidate, inputs)
    forward, both = run.milliseconds(step.forward, 30, 150), run.milliseconds(step.both, 30, 150)
    rates = {"forward": 3 * shape.products / forward / 1e9, "both": 9 * shape.products / both / 1e9}
    found = {"forward_ms": forward, "both_ms": both}
    found |= {f"{name}_tflops": rate for name, rate in rates.items()}
    found |= {f"{name}_of_dense": rate / dense for name, rate in rates.items()}
    if not run.dry:
        found["peak_gib"] = peak_memory(step.both)
    return found


def peak_memory(work: Callable[[], object]) -> float:
    """Return the GiB at the height of a call, above what is allocated before it."""
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def captured(work: Callable[[], Any]) -> tuple[Any, Any]:
    """Return a CUDA graph of a call, and what the call returns there; it is warmed up on a stream of its own."""
    stream = _cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with _cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = _cuda.CUDAGraph()
    with _cuda.graph(graph):
        out = work()
    return graph, out
