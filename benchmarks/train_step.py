"""A training step of SmolLM2-135M with 8 experts, top-2: moeify against transformers' Mixtral, on one CPU thread.

    python benchmarks/train_step.py [--repeats 3]

512 tokens, float32, forward, backward and an SGD step, balancing loss included on both sides. Each run is a process of
its own that builds the model (same shapes, random weights), takes one step to warm up and times two; runs alternate.
Needs 8 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from statistics import median
from typing import Any

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip
VARIANTS = ("moeify", "mixtral grouped_mm")  # of Mixtral's the fastest on CPUs (experts_cpu.py)
TOKENS = 512


def build(variant: str) -> Any:
    """The model of a variant, in training mode."""
    import transformers

    tf: Any = transformers
    if variant == "moeify":
        import moeify

        dense = tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE))
        return moeify.convert(dense, moeify.MoEConfig(8, 2, attach_losses=True)).train()
    config = tf.MixtralConfig(**SHAPE, num_local_experts=8, num_experts_per_tok=2, output_router_logits=True)
    model = tf.MixtralForCausalLM(config)
    model.set_experts_implementation(variant.split()[1])
    return model.train()


def worker(variant: str) -> None:
    """Take steps and print what they took."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(variant)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    ids = torch.randint(SHAPE["vocab_size"], (1, TOKENS))
    took = []
    for _ in range(3):
        start = time.process_time()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        took.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": median(took[1:]), "peak_gib": peak}))


def main() -> None:
    """Run the variants by turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.repeats):
        for variant, runs in found.items():
            command = [sys.executable, __file__, "--worker", variant]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append(json.loads(output.splitlines()[-1]))
            print(variant, runs[-1], file=sys.stderr, flush=True)
    print("| step | CPU seconds, median | peak memory, GiB |\n| --- | --- | --- |")
    for variant, runs in found.items():
        seconds, peak = (median(run[key] for run in runs) for key in ("seconds", "peak_gib"))
        print(f"| {variant} | {seconds:.2f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
