"""A training step of SmolLM2-135M with 8 experts, top-2: moeify against transformers' Mixtral, on one CPU thread.

    python -m benchmarks.train_step [--repeats 3]

512 tokens, float32, forward, backward and an SGD step, balancing loss included on both sides. Both read a checkpoint
that `moeify convert` wrote from the same dense model, with the same experts. Each run is a process of its own that
takes one step to warm up and times three; runs alternate. Needs 8 GB of memory and 7 GB of disk. Record and page are
written beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import key, make_checkpoint
from benchmarks.record import ROOT, Record, keep, measured

VARIANTS = {  # of Mixtral's implementations the two fastest on CPUs (experts_cpu.py)
    "moeify": ("moeify", "--set", "attach_losses=true"),
    "mixtral grouped_mm": ("mixtral",),
    "mixtral eager": ("mixtral",),
}
TOKENS = 512
CODE = ("kernels/cpu.py", "kernels/pages.py", "moeify/layers")


def load(variant: str, path: str) -> Any:
    """The model of a variant, in training mode."""
    import moeify

    if variant == "moeify":
        return moeify.load(path).train()
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(path, experts_implementation=variant.split()[1], output_router_logits=True)
    return model.train()


def worker(variant: str, path: str) -> None:
    """Take steps and print what they took."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = load(variant, path)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ids = torch.randint(model.config.vocab_size, (1, TOKENS))
    took = []
    for _ in range(4):
        start = time.process_time()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        took.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": median(took[1:]), "peak_gib": peak}))


def compare(work: Path, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Return what each variant took, round by round."""
    dense = make_checkpoint("smollm2", work / "dense")
    for family, *settings in set(VARIANTS.values()):
        command = ("-m", "moeify", "convert", dense, work / family, "--experts", "8", "--top-k", "2", "--to", family)
        subprocess.run([sys.executable, *command, *settings], check=True)
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(repeats):
        for variant, runs in found.items():
            step = ("-m", "benchmarks.train_step", "--worker", variant, "--model", work / VARIANTS[variant][0])
            output = subprocess.run([sys.executable, *step], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(output.stdout.splitlines()[-1]))
            print(variant, runs[-1], flush=True)
    return found


def summary(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Return medians and spread, and moeify's time and memory as multiples of those of the fastest peer."""
    rows: dict[str, Any] = {}
    for variant, of_variant in runs.items():
        seconds, peaks = ([run[which] for run in of_variant] for which in ("seconds", "peak_gib"))
        rows[key(variant)] = {"name": variant, "seconds": median(seconds), "fastest": min(seconds),
                              "slowest": max(seconds), "peak_gib": median(peaks)}  # fmt: skip
    ours, best = rows["moeify"], min(set(runs) - {"moeify"}, key=lambda variant: rows[key(variant)]["seconds"])
    by_round = [ours["seconds"] / peer["seconds"] for ours, peer in zip(runs["moeify"], runs[best], strict=True)]
    peer = rows[key(best)]
    times = {"time": ours["seconds"] / peer["seconds"], "least_time": min(by_round), "most_time": max(by_round)}
    return {"rows": rows, **times, "memory": ours["peak_gib"] / peer["peak_gib"]}


def page(record: Record) -> str:
    """Return the page of a record."""
    lines = [
        "# A training step on one CPU thread\n",
        f"{record.what}; one process each, by turns.",
        f"{record.line()}\n",
        "| step | CPU seconds, median | least, most | peak memory, GiB |",
        "|---|--:|--:|--:|",
    ]
    for row in record.summary["rows"].values():
        lines.append("| {name} | {seconds:.2f} | {fastest:.2f}, {slowest:.2f} | {peak_gib:.2f} |".format(**row))
    said = "moeify needs {memory:.2f} of the memory and {time:.2f} times the time of the fastest of Mixtral's"
    spread = "{least_time:.2f} to {most_time:.2f} times from round to round"
    lines += [f"\n{said};\n{spread}.".format(**record.summary)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write record and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.model)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as work:
        runs = compare(Path(work), args.repeats)
    what = f"SmolLM2-135M with 8 experts, top-2; {TOKENS} tokens, float32, SGD, balancing loss"
    keep(__file__, measured(what, "transformers' Mixtral", CODE, summary(runs), runs), page)


if __name__ == "__main__":
    main()
