"""Check exported files against the onnxruntime-gpu wheel, as far as a machine without a GPU can.

    python -m benchmarks.onnx_gpu_wheel --venv FOLDER MODEL.onnx …

Installs the wheel into FOLDER the first time (it cannot live beside onnxruntime). Then, for each file: does it load and
run on the wheel's CPU provider, which provider does the session use (it falls back silently), and has the wheel's CUDA
library a kernel class for each operator? The classes are read from the library's type names, since it does not load
without a driver. MoE is looked up with its dtype.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import onnx

VERSION = "1.31.1"
NAMES = {1: "f", 10: "NS_9MLFloat16E", 16: "NS_8BFloat16E"}
# Kernel classes of another name; None where the kernel is the CPU's own, which reads a shape and no data.
ALIASES = {"Max": "VariadicElementwiseOp", "LayerNormalization": "LayerNorm", "Shape": None, "Constant": None}
RUN = """
import sys, numpy as np, onnxruntime as ort
ort.set_default_logger_severity(4)
options = ort.SessionOptions(); options.log_severity_level = 4
session = ort.InferenceSession(sys.argv[1], options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
sizes = {"batch": 2, "sequence": 5, "past_sequence": 0, "total_sequence": 5}
types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
feed = {i.name: np.ones([sizes.get(d, d) for d in i.shape], types[i.type]) for i in session.get_inputs()}
outputs = session.run(None, feed)
print(session.get_providers()[0], "finite" if all(np.isfinite(o).all() for o in outputs) else "NOT FINITE")
"""


def kernel_classes(venv: Path) -> set[str]:
    """The names in the CUDA library that look like kernel classes, with their template arguments."""
    library = next(venv.rglob("libonnxruntime_providers_cuda.so"))
    found = re.findall(rb"N11onnxruntime(?:7contrib)?4cuda(\d+)(\w+)", library.read_bytes())
    return {name.decode()[: int(size)] + "<" + name.decode()[int(size) :] for size, name in found}


def without_kernel(path: Path, classes: set[str]) -> list[str]:
    """Operators of a file that no class is named after."""
    model = onnx.load(path, load_external_data=False)
    plain = {entry.split("<")[0] for entry in classes}
    missing = {n.op_type for n in model.graph.node if ALIASES.get(n.op_type, n.op_type) not in {*plain, None}}
    dtypes = {init.name: init.data_type for init in model.graph.initializer}
    for node in model.graph.node:
        wanted = f"MoE<I{NAMES[dtypes[node.input[2]]]}" if node.op_type == "MoE" else ""
        if not any(entry.startswith(wanted) for entry in classes):
            missing.add(wanted)
    return sorted(missing)


def main() -> None:
    """Check every file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("models", type=Path, nargs="+")
    arguments = parser.parse_args()
    python = arguments.venv / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", arguments.venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", f"onnxruntime-gpu=={VERSION}", "numpy"], check=True)
    classes = kernel_classes(arguments.venv)
    for path in arguments.models:
        result = subprocess.run([python, "-c", RUN, path], capture_output=True, text=True, check=False)
        outcome = result.stdout.strip() or (result.stderr.strip().splitlines() or ["no output"])[-1][:120]
        print(
            f"{path.name}: {outcome}; operators without a CUDA kernel class: {without_kernel(path, classes) or 'none'}"
        )


if __name__ == "__main__":
    main()
