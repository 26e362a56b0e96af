"""Run one exported file with the CUDA provider and print what it did as JSON: `run_one.py MODEL.onnx plain|graph`.

It imports nothing of this repository, because torch must not be in the process: it would load the real libraries.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import onnxruntime

SIZES = {"batch": 2, "sequence": 1, "past_sequence": 16, "total_sequence": 17}
TYPES = {"tensor(float)": ("float32", 1), "tensor(float16)": ("float16", 10), "tensor(bfloat16)": ("uint16", 16),
         "tensor(int64)": ("int64", 7)}  # fmt: skip
RUNS = 3  # of a captured session: the first ones allocate


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
    """Load, run, and read the profile: nodes of experts by provider, copies, and what is on the CPU beside sizes."""
    path, graph = sys.argv[1], sys.argv[2] == "graph"
    session = open_session(path, graph)
    binding, _held = bind(session)
    failed = None
    try:
        for _ in range(RUNS if graph else 1):
            session.run_with_iobinding(binding)
    except Exception as error:  # what reads garbage on the CPU fails
        failed = " ".join(str(error).split())[-200:]
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [e["args"] for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    on_cpu = [node for node in nodes if node["provider"] == "CPUExecutionProvider"]
    values = [node for node in on_cpu if any(set(kind) - {"int64", "bool"} for kind in node["output_type_shape"])]
    experts = [f"{n['op_name']}@{n['provider'][:4].rstrip('E')}" for n in nodes if n["op_name"] in {"MoE", "QMoE"}]
    print(json.dumps({
        "failed": failed, "nodes": len(nodes), "experts": experts,
        "copies": sum(node["op_name"].startswith("Memcpy") for node in nodes),
        "sizes_on_cpu": len(on_cpu) - len(values), "values_on_cpu": [node["op_name"] for node in values],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
