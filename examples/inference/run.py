"""Time and memory of an MoE in use: against its dense model, and dense models of its FLOPs and of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import moeify
from benchmarks.by_turns import cpu_milliseconds, samples
from examples import small_lm as lm

HERE = Path(__file__).parent
EXPERTS, TOP_K = 8, 2
HIDDEN, INTERMEDIATE, LAYERS, PROMPT = 512, 1536, 4, 256
QUICK = (32, 64, 2, 16)
MANY = 16  # sequences that are generated together
HEADER = ("model", "parameters", "met by a token", "MB of weights", "MB to train", "ms per token of a prompt",
          "ms per generated token", f"ms per generated token of {MANY} sequences")  # fmt: skip


def main() -> None:
    """Measure each model by turns, write the table and the plot."""
    args = lm.options(__doc__)
    torch.set_num_threads(1)
    sizes = QUICK if args.quick else (HIDDEN, INTERMEDIATE, LAYERS, PROMPT)
    models, prompt = models_of(*sizes), torch.randint(lm.VOCABULARY, (MANY, sizes[-1]))
    memory = {name: megabytes_to_train(copy.deepcopy(model), prompt[:1]) for name, model in models.items()}
    calls = {}
    for name, model in models.items():
        calls[f"prompt {name}"] = timed(model, prompt[:1])
        calls[f"one {name}"] = timed(model, prompt[:1, :1])
        calls[f"many {name}"] = timed(model, prompt[:, :1])
    took = {name: median(each) for name, each in samples(calls, 1 if args.quick else 15).items()}
    rows, lines = [], []
    for name, model in models.items():
        count = sum(p.numel() for p in model.parameters())
        of_prompt, one, many = (took[f"{what} {name}"] for what in ("prompt", "one", "many"))
        per_token = of_prompt / prompt.shape[1], one, many / MANY
        rows.append([name, f"{count / 1e6:.1f} M", f"{lm.flops_per_token(model) / 6e6:.1f} M", f"{count * 4 / 1e6:.0f}",
                     f"{memory[name]:.0f}", *(f"{value:.2f}" for value in per_token)])  # fmt: skip
        lines.append((name, count / 1e6, per_token))
    lm.write_table(HERE, args, HEADER, rows)
    panels = [
        (f"{title}: million parameters", [(name, [count], [values[i]]) for name, count, values in lines])
        for i, title in enumerate(("a prompt", "generation", f"generation of {MANY} sequences"))
    ]
    lm.plot(HERE / "time.png", args, *panels, y="CPU ms per token of one thread")


def models_of(hidden: int, intermediate: int, layers: int, prompt: int) -> dict[str, Any]:
    """The four models, with random weights."""

    def dense(factor: int) -> Any:
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=lm.VOCABULARY, hidden_size=hidden, intermediate_size=factor * intermediate,
                num_hidden_layers=layers, num_attention_heads=8, max_position_embeddings=prompt,
                tie_word_embeddings=True,
            )
        )  # fmt: skip
        return model.eval()

    moe: Any = moeify.convert(dense(1), moeify.MoEConfig(EXPERTS, TOP_K))
    return {
        "dense": dense(1),
        f"MoE of it, {EXPERTS} experts, top-{TOP_K}": moe.eval(),
        "dense of the MoE's FLOPs": dense(TOP_K),
        "dense of the MoE's parameters": dense(EXPERTS),
    }


def timed(model: Any, ids: Tensor) -> Callable[[], float]:
    """A call that takes the CPU time of a forward pass in inference."""

    @torch.no_grad()
    def call() -> float:
        return cpu_milliseconds(lambda: model(input_ids=ids, use_cache=False))

    return call


def megabytes_to_train(model: Any, ids: Tensor) -> float:
    """Weights, gradients, Adam's two moments, and what the forward pass keeps for the backward pass."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no storage's place is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    optimizer = lm.optimizer_for(model.train())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    lm.update(model, optimizer, loss)
    tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    held_bytes: int = sum(t.numel() * t.element_size() for t in tensors) + sum(kept.values())
    return held_bytes / 1e6


if __name__ == "__main__":
    main()
