"""Check exported files against the onnxruntime-gpu wheel, as far as a machine without a GPU can.

    python -m benchmarks.onnx_gpu_wheel --venv FOLDER [MODEL.onnx …]

Installs the wheel into FOLDER the first time (it cannot live beside onnxruntime). Then, for each file: does it load and
run on the wheel's CPU provider, which provider does the session use (it falls back silently), and has the wheel's CUDA
library a kernel class for each operator? The classes are read from the library's type names, since it does not load
without a driver. MoE is looked up with its dtype; QMoE is one class for float16 and bfloat16.
Without files it exports a small model for every target. Exit code 1 if something is missing.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
import transformers

import moeify

VERSION = "1.31.1"
NAMES = {1: "f", 10: "NS_9MLFloat16E", 16: "NS_8BFloat16E"}
# Kernel classes of another name; None where the kernel is the CPU's own, which reads a shape and no data.
ALIASES = {
    "Max": "VariadicElementwiseOp",
    "Min": "VariadicElementwiseOp",
    "Split": "Split_18",
    "ScatterND": "ScatterNDDisjointAndNoReduction",
    "LayerNormalization": "LayerNorm",
    "Shape": None,
    "Constant": None,
}
EXPORTS: tuple[tuple[str, str | None, str], ...] = (
    ("cpu", None, "float32"), ("cpu", "int8", "float32"), ("cpu", "int4", "float32"), ("portable", None, "float32"),
    ("cuda", None, "float32"), ("cuda", None, "float16"), ("cuda", None, "bfloat16"),
    ("cuda", "int8", "float16"), ("cuda", "int4", "float16"), ("cuda", "int4", "bfloat16"),
)  # fmt: skip
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


def export_all(folder: Path) -> list[Path]:
    """Export a small model for every target."""
    tf: Any = transformers
    config = tf.MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=101, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    paths = []
    for target, quantize, dtype in EXPORTS:
        paths.append(folder / f"{target}-{quantize or dtype}{f'-{dtype}' * bool(quantize)}.onnx")
        model = tf.MixtralForCausalLM(config).eval().to(getattr(torch, dtype))
        moeify.export_onnx(model, paths[-1], target, quantize)
    return paths


def main() -> None:
    """Check every file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("models", type=Path, nargs="*")
    arguments = parser.parse_args()
    python = arguments.venv / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", arguments.venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", f"onnxruntime-gpu=={VERSION}", "numpy"], check=True)
    with TemporaryDirectory() as folder:
        paths = arguments.models or export_all(Path(folder))
        classes = kernel_classes(arguments.venv)
        good = [check(path, python, classes) for path in paths]
    sys.exit(not all(good))


def check(path: Path, python: Path, classes: set[str]) -> bool:
    """Print what holds of a file; returns whether all that must hold does."""
    result = subprocess.run([python, "-c", RUN, path], capture_output=True, text=True, check=False)
    outcome = result.stdout.strip() or (result.stderr.strip().splitlines() or ["no output"])[-1][:120]
    only_gpu = "NOT_IMPLEMENTED" in outcome and "bfloat16" in path.name
    if only_gpu:
        outcome = "not run: the CPU provider has no kernels for bfloat16"
    print(f"{path.name}: {outcome}", end="")
    target = {p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}["moeify.target"]
    missing = without_kernel(path, classes) if target == "cuda" else []
    if target == "cuda":
        print(f"; operators without a CUDA kernel class: {', '.join(missing) or 'none'}", end="")
    print(flush=True)
    return (only_gpu or result.returncode == 0) and not missing and "NOT FINITE" not in outcome


if __name__ == "__main__":
    main()
