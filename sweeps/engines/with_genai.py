"""onnxruntime-genai, on the folder that `moeify export` writes: a prompt, then a token at a time, as it generates."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sweeps.engines.program import TOKENS, Told, compared, main

PROMPT = 192  # tokens: with fewer than 64, LongRoPE has other frequencies than for all 256


def run(path: Path) -> Told:
    """Export a checkpoint, and give it the tokens.

    Raises:
        ValueError: It is not exported; what moeify says.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "moeify", "export", str(path), f"{folder}/onnx"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"moeify export: {done.stderr.strip().splitlines()[-1]}")
        if not Path(folder, "onnx/genai_config.json").exists():
            raise ValueError("moeify export: it has caches that onnxruntime-genai does not know")
        genai: Any = import_module("onnxruntime_genai")
        model = genai.Model(f"{folder}/onnx")
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(TOKENS) + 1)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array([TOKENS[:PROMPT]], np.int32))
        found = [*np.array(generator.get_output("logits"))[0]]
        for token in TOKENS[PROMPT:]:
            generator.append_tokens(np.array([[token]], np.int32))
            found.append(np.array(generator.get_logits())[0, -1].copy())
    return Told(np.stack(found))


if __name__ == "__main__":
    main(compared(run), version("onnxruntime-genai"))
