"""Generate text from an exported model with nothing but onnxruntime, numpy and tokenizers.

    python examples/onnx/generate.py MODEL.onnx "The capital of France is"

Keys and values stay in ONNX Runtime's own buffers between steps, on the GPU too.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def main() -> None:
    """Read the prompt, print the text."""
    path, prompt = sys.argv[1:3]
    wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(
        path, providers=[p for p in wanted if p in onnxruntime.get_available_providers()]
    )
    device = "cuda" if session.get_providers()[0] == wanted[0] else "cpu"  # it falls back to the CPU without an error
    metadata = session.get_modelmeta().custom_metadata_map
    tokenizer = Tokenizer.from_str(metadata["moeify.tokenizer"])
    ends = set(map(int, metadata["moeify.eos_token_ids"].split()))
    states = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]

    binding = session.io_binding()
    for state in states:
        dtype = np.float16 if "float16" in state.type else np.float32
        empty = np.zeros((1, state.shape[1], 0, state.shape[3]), dtype)
        binding.bind_ortvalue_input(state.name, onnxruntime.OrtValue.ortvalue_from_numpy(empty, device, 0))
    ids, total = tokenizer.encode(prompt).ids, 0
    for _ in range(64):
        total += len(ids)
        binding.bind_cpu_input("input_ids", np.array([ids]))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        binding.bind_cpu_input("position_ids", np.arange(total - len(ids), total)[None])
        binding.bind_output("logits", "cpu")
        for state in states:
            binding.bind_output(state.name.replace("past_key_values", "present"), device)
        session.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        token = int(logits.numpy()[0, -1].argmax())
        if token in ends:
            break
        print(tokenizer.decode([token]), end="", flush=True)
        for state, present in zip(states, presents, strict=True):
            binding.bind_ortvalue_input(state.name, present)
        ids = [token]
    print(f"\n[{session.get_providers()[0]}]", file=sys.stderr)


if __name__ == "__main__":
    main()
