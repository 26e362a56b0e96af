"""Time a whole MoE language model on one CPU thread: ONNX Runtime beside PyTorch and transformers' own exporter.

    python -m benchmarks.onnx_model MOE MODEL.onnx --int8 FILE --int4 FILE [--peer FOLDER]

MOE is a checkpoint that transformers knows, MODEL.onnx what `moeify export` made of it. With `--peer` FOLDER gets what
transformers' own exporter makes of it (minutes, the first time); `--int8` and `--int4` are further exports of moeify.
Record and page are written beside this file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.measure import key
from benchmarks.record import Record, keep, measured
from moeify.hub.loading import load
from moeify.runtime.session import open_session
from moeify.runtime.text import TextModel

PROMPT, NEW, ROUNDS, TURNS = 128, 24, 3, 4
KINDS, OURS = ("prompt", "generation"), "moeify export"
CODE = ("moeify/export", "moeify/runtime")
Timing = tuple[float, float]


def rate(tokens: int, run: Callable[[], object]) -> float:
    """Tokens per second of CPU time, the median over rounds."""
    taken = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        run()
        taken.append(tokens / (time.thread_time() - start))
    return median(taken)


def rates(run: Callable[[int], object], prompt_tokens: int) -> Timing:
    """Time a prompt, and each further token after it; `run` takes the number of further tokens."""
    run(0)
    prompt = rate(prompt_tokens, lambda: run(0))
    both = rate(1, lambda: run(NEW))
    return prompt, NEW / (1 / both - prompt_tokens / prompt)


def onnx_rates(path: Path, ids: list[int]) -> Timing:
    """The exported file."""
    model = TextModel(path, provider="cpu", threads=1)
    model.end_ids = set()
    return rates(lambda new: list(model.tokens(ids, new + 1)), len(ids))


@torch.no_grad()
def torch_rates(moe: Path, ids: list[int]) -> Timing:
    """PyTorch eager with transformers' cache."""
    torch.set_num_threads(1)
    model: Any = load(moe, dtype=torch.float32)
    inputs = torch.tensor([ids])

    def run(new: int) -> None:
        output = model(inputs, use_cache=True)
        for _ in range(new):
            output = model(output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values, use_cache=True)

    return rates(run, len(ids))


def export_peer(moe: Path, folder: Path) -> Path:
    """Export with transformers, unless it is done: its graph for pieces of any length with keys and values."""
    path = folder / "decode.onnx"
    if not path.exists():
        exporter: Any = import_module("transformers.exporters.exporter_onnx")
        model, ids = load(moe, dtype=torch.float32), torch.ones(2, 6, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        exported = exporter.OnnxExporter().export_for_generation(
            model, inputs, exporter.OnnxConfig(dynamic=True), multi_token_decode=True
        )
        exported.save_pretrained(folder)
    return path


def peer_rates(path: Path, ids: list[int]) -> Timing:
    """What transformers' own exporter makes, in the same ONNX Runtime."""
    session = open_session(path, provider="cpu", threads=1)
    states = [argument for argument in session.get_inputs() if ".cache." in argument.name]
    names = ["logits", *(state.name.replace("input.", "output.", 1) for state in states)]
    value = import_module("onnxruntime").OrtValue.ortvalue_from_numpy

    def run(new: int) -> None:
        piece, total = np.array([ids]), len(ids)
        cache = [value(np.zeros((1, int(state.shape[1]), 0, int(state.shape[3])), np.float32)) for state in states]
        for _ in range(new + 1):
            feed = {"input_ids": value(piece), "position_ids": value(np.arange(total - piece.shape[1], total)[None])}
            feed |= {state.name: held for state, held in zip(states, cache, strict=True)}
            logits, *cache = session.run_with_ort_values(names, feed)
            piece, total = logits.numpy()[:, -1:].argmax(-1), total + 1

    return rates(run, len(ids))


def in_turn(measurements: Mapping[str, Callable[[], Timing]]) -> dict[str, list[Timing]]:
    """Measure by turns, to and fro, each in a process of its own: what is loaded first gets other memory."""
    taken: dict[str, list[Timing]] = {name: [] for name in measurements}
    for turn in range(TURNS):
        for name, measure in list(measurements.items())[:: -1 if turn % 2 else 1]:
            with get_context("spawn").Pool(1) as pool:
                taken[name].append(pool.apply(measure))
            print(name, taken[name][-1], flush=True)
    return taken


def summary(runs: Mapping[str, Sequence[Timing]]) -> dict[str, Any]:
    """Return the medians, and how many times as fast as each of the others the export is."""
    rows: dict[str, dict[str, Any]] = {
        key(name): {"name": name, **{kind: median(turn[at] for turn in turns) for at, kind in enumerate(KINDS)}}
        for name, turns in runs.items()
    }
    ours = rows[key(OURS)]
    for row in rows.values():
        row |= {f"{kind}_gain": ours[kind] / row[kind] for kind in KINDS}
    fourbit = rows[key(f"{OURS} --quantize int4")]
    return {"rows": rows, "int4_over_float32": fourbit["generation"] / ours["generation"]}


def page(record: Record) -> str:
    """Return the page of a record."""
    lines = [
        "# A whole MoE language model on one CPU thread\n",
        f"{record.what}. Tokens per second of CPU time, medians of {TURNS} turns, each in a process of its own.",
        f"{record.line()}\n",
        "| | prompt | generation |",
        "|---|--:|--:|",
    ]
    lines += ["| {name} | {prompt:.1f} | {generation:.1f} |".format(**row) for row in record.summary["rows"].values()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write record and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moe", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", type=Path, help="also transformers' own exporter, in this folder")
    parser.add_argument("--int8", type=Path, required=True, help="the export with --quantize int8")
    parser.add_argument("--int4", type=Path, required=True, help="the export with --quantize int4")
    arguments = parser.parse_args()
    ids = np.random.default_rng(0).integers(0, 40_000, PROMPT).tolist()
    files = {"": arguments.model, " --quantize int8": arguments.int8, " --quantize int4": arguments.int4}
    measurements: dict[str, Callable[[], Timing]] = {
        f"{OURS}{option}": partial(onnx_rates, path, ids) for option, path in files.items()
    }
    measurements["PyTorch eager"] = partial(torch_rates, arguments.moe, ids)
    if arguments.peer:
        measurements["transformers' exporter"] = partial(peer_rates, export_peer(arguments.moe, arguments.peer), ids)
    runs = in_turn(measurements)
    what = (
        f"{arguments.moe.name}, float32 but for quantized experts; a prompt of {PROMPT} tokens, {NEW} tokens after it"
    )
    against = "PyTorch eager and transformers' exporter"
    keep(__file__, measured(what, against, CODE, summary(runs), runs, packages=("onnxruntime",)), page)


if __name__ == "__main__":
    main()
