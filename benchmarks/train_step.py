"""A training step of SmolLM2-135M with 8 experts, top-2: moeify against transformers' Mixtral, on one CPU thread.

    python benchmarks/train_step.py [--repeats 3] [--write]

512 tokens, float32, forward, backward and an SGD step, balancing loss included on both sides. Both read a checkpoint
that `moeify convert` wrote from the same dense model, with the same experts. Each run is a process of its own that
takes one step to warm up and times three; runs alternate. Needs 8 GB of memory and 7 GB of disk.
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
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__)
VARIANTS = {  # of Mixtral's implementations the two fastest on CPUs (experts_cpu.py)
    "moeify": ("moeify", "--set", "attach_losses=true"),
    "mixtral grouped_mm": ("mixtral",),
    "mixtral eager": ("mixtral",),
}
TOKENS = 512


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


def compare(work: Path, repeats: int) -> str:
    """Run the variants by turns; the table of medians, in Markdown."""
    dense = work / "dense"
    subprocess.run([sys.executable, HERE.with_name("make_checkpoint.py"), "smollm2", dense], check=True)
    for family, *settings in set(VARIANTS.values()):
        command = ("-m", "moeify", "convert", dense, work / family, "--experts", "8", "--top-k", "2", "--to", family)
        subprocess.run([sys.executable, *command, *settings], check=True)
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(repeats):
        for variant, runs in found.items():
            step = (sys.executable, HERE, "--worker", variant, "--model", work / VARIANTS[variant][0])
            output = subprocess.run(step, check=True, capture_output=True, text=True).stdout
            runs.append(json.loads(output.splitlines()[-1]))
            print(variant, runs[-1], file=sys.stderr, flush=True)
    lines = ["| step | CPU seconds, median | least, most | peak memory, GiB |", "|---|--:|--:|--:|"]
    for variant, runs in found.items():
        seconds, peaks = ([run[key] for run in runs] for key in ("seconds", "peak_gib"))
        spread = f"{min(seconds):.2f}, {max(seconds):.2f}"
        lines.append(f"| {variant} | {median(seconds):.2f} | {spread} | {median(peaks):.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the table to train_step.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.model)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as work:
        table = compare(Path(work), args.repeats)
    print(table)
    if args.write:
        head = (
            "# A training step on one CPU thread\n\nSmolLM2-135M with 8 experts, top-2; 512 tokens, float32, SGD, "
            f"balancing loss; {args.repeats} processes each, by turns.\n"
            "Made by `python benchmarks/train_step.py --write`.\n\n"
        )
        HERE.with_suffix(".md").write_text(f"{head}{table}\n")


if __name__ == "__main__":
    main()
