"""Sessions of ONNX Runtime that really are on the provider under test, with inputs and outputs in PyTorch's memory."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from benchmarks.gpu.run import Run

# Of ONNX Runtime's types: the dtype, and its number in ONNX.
KINDS = {
    "tensor(float)": (torch.float32, 1),
    "tensor(float16)": (torch.float16, 10),
    "tensor(bfloat16)": (torch.bfloat16, 16),
    "tensor(int64)": (torch.int64, 7),
    "tensor(bool)": (torch.bool, 9),
    "tensor(int32)": (torch.int32, 6),
}
Session = Any  # onnxruntime.InferenceSession, which ships no types


def open_session(run: Run, path: Path, *, profile: Path | None = None, graph: bool = False) -> Session:
    """Return a session on the provider under test.

    Args:
        run: Says whether that is the GPU.
        path: The ONNX file.
        profile: Where the session writes what it executed; None writes nothing.
        graph: Whether the session captures what it runs as a CUDA graph; a CPU has none.

    Raises:
        RuntimeError: ONNX Runtime took another provider, as it does without a word when a library is missing.
    """
    settings: Any = onnxruntime.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 3, 2
    if profile is not None:
        settings.enable_profiling, settings.profile_file_prefix = True, str(profile)
    wanted = "CPUExecutionProvider" if run.dry else "CUDAExecutionProvider"
    provider = wanted if run.dry else (wanted, {"use_tf32": "0", "enable_cuda_graph": str(int(graph))})
    session: Session = onnxruntime.InferenceSession(str(path), settings, providers=[provider], enable_fallback=0)
    if session.get_providers()[0] != wanted:
        raise RuntimeError(f"the session is on {session.get_providers()}")
    return session


class Bound:
    """A session whose inputs and outputs have fixed addresses, so that it can be captured and replayed."""

    def __init__(self, run: Run, session: Session, inputs: Mapping[str, Tensor]) -> None:
        self._device, self._session, self._binding = run.device, session, session.io_binding()
        self._inputs: dict[str, Tensor] = {}
        self._held: list[Tensor] = []  # addresses for what is empty
        self._outputs: dict[str, Tensor] = {}
        sizes: dict[str, int] = {}
        for argument in session.get_inputs():
            value = inputs[argument.name].to(self._device, KINDS[argument.type][0]).contiguous().clone()
            sizes |= {n: s for n, s in zip(argument.shape, value.shape, strict=True) if isinstance(n, str)}
            self._inputs[argument.name] = value
            self._bind(self._binding.bind_input, argument, value)
        if {"past_sequence", "sequence"} <= sizes.keys():
            sizes["total_sequence"] = sizes["past_sequence"] + sizes["sequence"]
        for argument in session.get_outputs():
            shape = [sizes[size] if isinstance(size, str) else size for size in argument.shape]
            value = torch.empty(shape, dtype=KINDS[argument.type][0], device=self._device)
            self._outputs[argument.name] = value
            self._bind(self._binding.bind_output, argument, value)
        synchronize(self._device)

    def _bind(self, bind: Callable[..., None], argument: Any, value: Tensor) -> None:
        kept = value if value.numel() else torch.empty(16, dtype=value.dtype, device=self._device)
        self._held.append(kept)
        bind(argument.name, self._device.type, 0, KINDS[argument.type][1], list(value.shape), kept.data_ptr())

    def run(self) -> dict[str, Tensor]:
        """Run once; the outputs are the same tensors each time."""
        self._session.run_with_iobinding(self._binding)
        return self._outputs

    def fill(self, inputs: Mapping[str, Tensor]) -> None:
        """Put new values at the same addresses."""
        for name, value in self._inputs.items():
            value.copy_(inputs[name])
        synchronize(self._device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(device: torch.device, work: Callable[[], object], limit: float = 0.15) -> float:
    """Return the median time of a call that ends when its work is done, as a caller sees it."""

    def once() -> float:
        start = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - start

    for _ in range(3):
        once()
    taken, end = list[float](), time.perf_counter() + limit
    while len(taken) < 5 or (time.perf_counter() < end and len(taken) < 50):
        taken.append(once())
    return round(statistics.median(taken) * 1e3, 4)


def executed(session: Session) -> dict[str, object]:
    """Return what a session with a profile ran where, on average: operators by provider, and copies between them."""
    path = Path(session.end_profiling())
    events = json.loads(path.read_text())
    path.unlink()
    runs = max(1, sum(event.get("name") == "model_run" for event in events))
    nodes = [e["args"] for e in events if e.get("cat") == "Node" and e.get("name", "").endswith("_kernel_time")]
    where = Counter((node["op_name"], node["provider"].removesuffix("ExecutionProvider")) for node in nodes)
    on_cpu = {op: round(count / runs, 2) for (op, on), count in where.items() if on == "CPU" and "Memcpy" not in op}
    return {
        "experts": {f"{op}@{on}": round(count / runs, 2) for (op, on), count in where.items() if op in {"MoE", "QMoE"}},
        "memcpy": round(sum(count for (op, _), count in where.items() if op.startswith("Memcpy")) / runs, 2),
        "on_cpu": on_cpu,
        "nodes": round(sum(where.values()) / runs, 1),
    }
