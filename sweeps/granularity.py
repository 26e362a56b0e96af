"""Cut the FFNs of a real model in 2, 4 and 8, measure its perplexity as it was and as an MoE; docs/granularity.json.

    python -m sweeps.granularity     SmolLM2-135M as Mixtral, two minutes on a CPU

The text comes with Python. Transformers alone loads what is measured. The recipe of Megatron, a cube root on all three
projections, is not exact for a FFN with a gate: there the perplexity rises with the granularity.
"""

from __future__ import annotations

import pydoc_data.topics
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import measured, write
from moeify.checkpoint.source import open_source
from moeify.cli.demo import model_file
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import Output, convert_checkpoint, plan_checkpoint
from moeify.conversion.dense import DenseCheckpoint
from moeify.hub.loading import load
from moeify.pretrained import load_tokenizer
from moeify.proving.perplexity import perplexity
from sweeps.families import load_stock
from sweeps.models import DOCS

RECORD = DOCS / "granularity.json"
CODE = ("moeify/conversion", "moeify/methods", "moeify/routers")
CUTS, TOKENS = (2, 4, 8), 512


def measure(tokens: int = TOKENS) -> dict[str, Any]:
    """Return the perplexity of the dense model, and of each MoE by its granularity, and the largest jump."""
    file, topics = model_file(), pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(load_tokenizer(file)(text[: 10 * tokens])["input_ids"][:tokens])
    found: dict[str, Any] = {"tokens": len(ids), "dense": perplexity(load(file, dtype=torch.float32), ids), "moe": {}}
    print("dense", found["dense"], flush=True)
    with tempfile.TemporaryDirectory() as folder, open_source(file) as source:
        dense = DenseCheckpoint(source)
        for cut in CUTS:
            config = MoEConfig(experts=2 * cut, top_k=cut, granularity=cut)
            output = Output(Path(folder, "moe"), 10**10, overwrite=True)
            convert_checkpoint(dense, plan_checkpoint(dense, config, "all", "mixtral"), output)
            found["moe"][str(cut)] = perplexity(load_stock(Path(folder, "moe")), ids)
            print(cut, found["moe"][str(cut)], flush=True)
    found["jump"] = max(abs(value / found["dense"] - 1) for value in found["moe"].values())
    return found


if __name__ == "__main__":
    what = "Perplexity of SmolLM2-135M and of it as a Mixtral, by granularity"
    write(measured(what, "the dense model", CODE, measure(), []), RECORD)
