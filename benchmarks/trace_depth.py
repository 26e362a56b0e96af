"""CPU time and memory of tracing a Llama-70B-shaped model and finding its FFNs, by depth.

    python benchmarks/trace_depth.py [LAYERS …]

Each depth runs in a process of its own, on the meta device: no weight exists. Prints a markdown table.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

DEPTHS = ("10", "20", "40", "80")


def measure(layers: int) -> None:
    """Build, trace and search one model; print a row of the table."""
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert len(found.ffns) == layers
    print(
        f"| {layers} | {len(graph_module.graph.nodes)} | {built - start:.1f} | {traced - built:.1f} | "
        f"{searched - traced:.2f} | {peak:.0f} |",
        flush=True,
    )


def main() -> None:
    """Measure every depth that was asked for."""
    depths = sys.argv[1:] or DEPTHS
    if len(depths) == 1:
        measure(int(depths[0]))
        return
    print("| layers | nodes | build, s | trace, s | find, s | peak memory, MB |\n|--:|--:|--:|--:|--:|--:|", flush=True)
    for depth in depths:
        subprocess.run([sys.executable, __file__, depth], check=True)


if __name__ == "__main__":
    main()
