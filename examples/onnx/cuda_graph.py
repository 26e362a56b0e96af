"""Replay an exported encoder as a CUDA graph: fixed shapes, fixed buffers, one launch for the whole model.

    moeify export BERT bert.onnx --target cuda
    python examples/onnx/cuda_graph.py bert.onnx

Needs onnxruntime-gpu and a GPU. (Generation grows its keys and values at each step, so it cannot be one graph.)
"""

from __future__ import annotations

import sys
import time

import numpy as np
import onnxruntime

BATCH, SEQUENCE = 8, 128
SIZES = {"batch": BATCH, "sequence": SEQUENCE}


def main() -> None:
    """Capture once, replay, print the time."""
    providers = [("CUDAExecutionProvider", {"enable_cuda_graph": "1"})]
    session = onnxruntime.InferenceSession(sys.argv[1], providers=providers)
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise SystemExit(f"onnxruntime fell back to {session.get_providers()[0]}: is onnxruntime-gpu installed?")
    binding, inputs = session.io_binding(), {}
    for argument in session.get_inputs():
        array = np.ones([SIZES.get(size, size) for size in argument.shape], np.int64)
        inputs[argument.name] = onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0)
        binding.bind_ortvalue_input(argument.name, inputs[argument.name])
    session.run_with_iobinding(_outputs_on_device(session, binding))  # the first run captures
    ids = np.random.default_rng(0).integers(0, 1000, (BATCH, SEQUENCE))
    inputs["input_ids"].update_inplace(ids)  # new contents, same address: a replay reads them
    start = time.perf_counter()
    session.run_with_iobinding(binding)
    print(f"{(time.perf_counter() - start) * 1e3:.2f} ms for {BATCH} x {SEQUENCE} tokens")


def _outputs_on_device(session: onnxruntime.InferenceSession, binding: onnxruntime.IOBinding) -> onnxruntime.IOBinding:
    """Let the outputs of a warm-up run be the buffers of every later one."""
    names = [output.name for output in session.get_outputs()]
    for name in names:
        binding.bind_output(name, "cuda")
    session.run_with_iobinding(binding)
    for name, value in zip(names, binding.get_outputs(), strict=True):
        binding.bind_ortvalue_output(name, value)
    return binding


if __name__ == "__main__":
    main()
