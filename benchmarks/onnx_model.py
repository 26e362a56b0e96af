"""Time a whole MoE language model on one CPU thread: ONNX Runtime beside PyTorch and transformers' own exporter.

    python -m benchmarks.onnx_model MOE MODEL.onnx [--peer] [--write]

MOE is a checkpoint and MODEL.onnx what `moeify export` made of it. `--peer` also exports with transformers (minutes),
without a cache, so that it has a prompt's time only. Figures are tokens per second of CPU time, medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeify.export.generation import TextModel
from moeify.hub.loading import load

PROMPT, NEW, ROUNDS = 128, 24, 5
Timing = tuple[float, float | None]


def rate(tokens: int, run: Callable[[], object]) -> float:
    """Tokens per second of CPU time, the median over rounds."""
    taken = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        run()
        taken.append(tokens / (time.thread_time() - start))
    return statistics.median(taken)


def onnx_rates(path: Path, ids: list[int]) -> Timing:
    """The exported file: prompt, and each further token after it."""
    model = TextModel(path, provider="cpu", threads=1)
    model.end_ids = set()
    prompt = rate(len(ids), lambda: list(model.tokens(ids, 1)))
    both = rate(1, lambda: list(model.tokens(ids, NEW + 1)))
    return prompt, NEW / (1 / both - len(ids) / prompt)


@torch.no_grad()
def torch_rates(model: Any, ids: list[int]) -> Timing:
    """PyTorch eager with transformers' cache."""
    inputs = torch.tensor([ids])

    def run(new: int) -> None:
        output = model(inputs, use_cache=True)
        for _ in range(new):
            output = model(output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values, use_cache=True)

    run(0)
    prompt = rate(len(ids), lambda: run(0))
    both = rate(1, lambda: run(NEW))
    return prompt, NEW / (1 / both - len(ids) / prompt)


def peer_rates(model: Any, ids: list[int], folder: Path) -> Timing:
    """What transformers' own exporter makes, in the same ONNX Runtime."""
    exporter: Any = import_module("transformers.exporters.exporter_onnx")
    onnxruntime = import_module("onnxruntime")
    example = {"input_ids": torch.tensor([ids[:5]] * 2), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    exported = exporter.OnnxExporter().export(
        model, {**example, "use_cache": False}, config=exporter.OnnxConfig(dynamic=True)
    )
    import_module("onnx_ir").save(exported.program, folder / "peer.onnx", external_data="peer.onnx.data")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(str(folder / "peer.onnx"), options, providers=["CPUExecutionProvider"])
    given = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    feed = {argument.name: given[argument.name] for argument in session.get_inputs()}
    session.run(None, feed)
    return rate(len(ids), lambda: session.run(None, feed)), None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("moe", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", action="store_true", help="also transformers' own exporter")
    parser.add_argument("--write", action="store_true", help="write onnx_model.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ids = np.random.default_rng(0).integers(0, 40_000, PROMPT).tolist()
    rows: dict[str, Timing] = {"moeify export": onnx_rates(arguments.model, ids)}
    print(rows, flush=True)
    model = load(arguments.moe, dtype=torch.float32)
    rows["PyTorch eager"] = torch_rates(model, ids)
    print(rows, flush=True)
    if arguments.peer:
        rows["transformers' exporter"] = peer_rates(model, ids, arguments.model.parent)
    text = "\n".join(
        [
            "# A whole MoE language model on one CPU thread",
            "",
            f"{arguments.moe.name}, onnxruntime {import_module('onnxruntime').__version__}, torch {torch.__version__}, "
            f"float32; a prompt of {PROMPT} tokens, {NEW} tokens after it; tokens per second of CPU time.",
            "",
            "| | prompt | generation |",
            "|---|--:|--:|",
            *(f"| {name} | {p:.1f} | {'' if n is None else f'{n:.1f}'} |" for name, (p, n) in rows.items()),
        ]
    )
    print(text)
    if arguments.write:
        Path(__file__).with_suffix(".md").write_text(text + "\n")


if __name__ == "__main__":
    main()
