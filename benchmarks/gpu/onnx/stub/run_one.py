"""Run one exported file with the CUDA provider and print what the profile says: `run_one.py MODEL.onnx plain|graph`.

It imports nothing of this repository, because torch must not be in the process: it would load the real libraries.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnxruntime

SIZES = {"batch": 2, "sequence": 1, "past_sequence": 16, "total_sequence": 17}
TYPES = {"tensor(float)": ("float32", 1), "tensor(float16)": ("float16", 10), "tensor(bfloat16)": ("uint16", 16),
         "tensor(int64)": ("int64", 7)}  # fmt: skip


def open_session(path: str, graph: bool) -> Any:
    """Return a session with a profile; SystemExit if it is not on CUDA."""
    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level, options.enable_profiling = 4, True
    options.profile_file_prefix = str(Path(mkdtemp()) / "profile")
    provider = ("CUDAExecutionProvider", {"enable_cuda_graph": str(int(graph))})
    session = onnxruntime.InferenceSession(path, options, providers=[provider], enable_fallback=0)
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise SystemExit(f"fell back to {session.get_providers()}")
    return session


def bind(session: Any) -> tuple[Any, list[np.ndarray]]:
    """Return a binding of all inputs and outputs, and the arrays behind it."""
    decoder = any(argument.name.startswith("past") for argument in session.get_inputs())
    sizes = SIZES if decoder else {**SIZES, "sequence": 32}
    binding, held = session.io_binding(), list[np.ndarray]()
    for arguments, method in ((session.get_inputs(), binding.bind_input), (session.get_outputs(), binding.bind_output)):
        for argument in arguments:
            kind, number = TYPES[argument.type]
            held.append(np.ones([sizes.get(size, size) for size in argument.shape], kind))
            method(argument.name, "cuda", 0, number, held[-1].shape, held[-1].ctypes.data)
    return binding, held


def main() -> None:
    """Load, run, and read the profile."""
    path, graph = sys.argv[1], sys.argv[2] == "graph"
    session = open_session(path, graph)
    binding, _held = bind(session)
    outcome = "captured" if graph else "ran"
    try:
        for _ in range(3 if graph else 1):
            session.run_with_iobinding(binding)
    except Exception as error:  # what reads garbage on the CPU fails
        outcome = f"run failed: {' '.join(str(error).split())[-200:]}"
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = Counter(
        (event["args"]["op_name"], event["args"]["provider"].removesuffix("ExecutionProvider"))
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )
    experts = {f"{op}@{on}": count for (op, on), count in nodes.items() if op in {"MoE", "QMoE"}}
    copies = sum(count for (op, _), count in nodes.items() if op.startswith("Memcpy"))
    on_cpu = {op: count for (op, on), count in nodes.items() if on == "CPU"}
    print(f"{outcome}; {experts}; {copies} copies; on the CPU {on_cpu}; {sum(nodes.values())} nodes")


if __name__ == "__main__":
    main()
