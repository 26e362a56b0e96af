"""CPU time and memory of tracing a Llama-70B-shaped model and finding its FFNs, by depth.

    python -m benchmarks.trace_depth [LAYERS …]

Each depth runs in a process of its own, on the meta device: no weight exists. Record and page are written beside this
file; of a single depth what was measured is only printed.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping

from benchmarks.record import ROOT, Record, keep, measured

DEPTHS = ("10", "20", "40", "80")
CODE = ("moeify/tracing", "passes")


def measure(layers: int) -> dict[str, float]:
    """Build, trace and search one model, in this process."""
    import torch
    import transformers

    from moeify.passes.find_ffn import find_ffns_in
    from moeify.tracing.trace import trace

    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    start = time.process_time()
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    built = time.process_time()
    graph_module = trace(model)
    traced = time.process_time()
    found = find_ffns_in(graph_module)
    searched = time.process_time()
    assert len(found.ffns) == layers
    return {
        "nodes": len(graph_module.graph.nodes),
        "build_seconds": built - start,
        "trace_seconds": traced - built,
        "find_seconds": searched - traced,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def summary(runs: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the runs, by depth, with what tracing and searching take together."""
    together = {layers: run["trace_seconds"] + run["find_seconds"] for layers, run in runs.items()}
    return {layers: {**run, "trace_and_find_seconds": together[layers]} for layers, run in runs.items()}


def page(record: Record) -> str:
    """Return the page of a record."""
    lines = [
        "# Tracing and searching a deep model\n",
        f"{record.what}. CPU seconds and peak memory of one process each.",
        f"{record.line()}\n",
        "| layers | nodes | build, s | trace, s | find, s | peak memory, MB |\n|--:|--:|--:|--:|--:|--:|",
    ]
    for layers, row in record.summary.items():
        lines.append(
            "| {} | {nodes} | {build_seconds:.1f} | {trace_seconds:.1f} | {find_seconds:.2f} | {peak_mb:.0f} |".format(
                layers.removeprefix("layers_"), **row
            )
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every depth that was asked for."""
    depths = sys.argv[1:] or DEPTHS
    if len(depths) == 1:
        print(json.dumps(measure(int(depths[0]))))
        return
    runs = {}
    for depth in depths:
        again = [sys.executable, "-m", "benchmarks.trace_depth", depth]
        said = subprocess.run(again, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
        runs[f"layers_{depth}"] = json.loads(said.splitlines()[-1])
    keep(__file__, measured("Llama-70B shape on the meta device", "nothing else", CODE, summary(runs), runs), page)


if __name__ == "__main__":
    main()
