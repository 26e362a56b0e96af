"""What the training examples share: a text, a small language model that reads bytes, a training loop, a written result.

The texts come with Python: its language reference (`pydoc_data.topics`) and the source of its standard library.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

import moeify
from examples import records
from moeify.layers import MoELayer

VOCABULARY, CONTEXT, BATCH = 256, 96, 16
TOKENS = CONTEXT * BATCH  # in one step
HIDDEN, INTERMEDIATE, LAYERS = 64, 192, 3


def options(description: str) -> argparse.Namespace:
    """Read the options that every example has, and seed torch."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=float, default=1.0, help="factor on the number of training steps")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs; writes no file")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.steps = 0.01
    torch.manual_seed(chosen.seed)
    return chosen


def reference_text() -> Tensor:
    """Python's language reference as bytes, about 700 000."""
    from pydoc_data.topics import topics

    return as_bytes("\n\n".join(topics[name] for name in sorted(topics)))


def source_text(characters: int = 700_000) -> Tensor:
    """The beginning of the standard library's modules, in the order of their names, as bytes."""
    files = sorted(Path(argparse.__file__).parent.glob("*.py"))
    return as_bytes("".join(path.read_text(encoding="utf-8", errors="ignore")[:20_000] for path in files)[:characters])


def as_bytes(text: str) -> Tensor:
    """A text as a tensor of bytes."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


@dataclass(frozen=True)
class Text:
    """A text cut into a part to train on and the last tenth, to measure on."""

    ids: Tensor

    def batches(self, steps: int, seed: int, rows: int = BATCH) -> Iterable[Tensor]:
        """Random windows of the first nine tenths, (rows, CONTEXT + 1)."""
        generator = torch.Generator().manual_seed(seed)
        end = len(self.ids) * 9 // 10 - CONTEXT - 1
        for _ in range(steps):
            starts = torch.randint(end, (rows,), generator=generator)
            yield torch.stack([self.ids[s : s + CONTEXT + 1] for s in starts.tolist()])

    def held_out(self) -> Tensor:
        """About a hundred windows of the last tenth, (N, CONTEXT + 1)."""
        held_out = self.ids[len(self.ids) * 9 // 10 :]
        windows = held_out[: len(held_out) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
        return windows[:: max(len(windows) // 96, 1)]

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        """Mean loss in nats per byte on windows of the last tenth."""
        model.eval()
        losses = [loss_of(model, part) for part in torch.split(self.held_out(), 48)]
        model.train()
        return float(torch.stack(losses).mean())


def dense_model() -> Any:
    """A Llama of 0.2 M parameters with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
            num_attention_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        )
    ).train()  # fmt: skip


def moe_from_scratch(config: moeify.MoEConfig) -> Any:
    """The same model as an MoE whose experts are drawn each for itself, as one without a dense past would be."""
    model = moeify.convert(dense_model(), config)
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            for weights in layer.experts.parameters():
                nn.init.normal_(weights, std=0.02)
    return model


def trained(args: argparse.Namespace) -> Any:
    """A dense model trained on the reference."""
    model = dense_model()
    train("dense", model, optimizer_for(model), Text(reference_text()), round(160 * args.steps), seed=args.seed)
    return model


def go_on(name: str, model: Any, args: argparse.Namespace) -> Any:
    """Go on with such a model, dense or converted, on the reference."""
    train(name, model, optimizer_for(model), Text(reference_text()), round(80 * args.steps), seed=args.seed + 1)
    return model


def loss_of(model: Any, windows: Tensor) -> Tensor:
    """Mean next-byte loss on windows (B, L + 1)."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def optimizer_for(model: nn.Module, rate: float = 2e-3) -> AdamW:
    """AdamW over what is trained."""
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)


def flops_per_token(model: Any) -> int:
    """FLOPs of a training step per token, in products with weights: 6 for each parameter that a token meets."""
    met: int = sum(p.numel() for p in model.parameters())
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            experts: int = sum(p.numel() for p in layer.experts.parameters())
            met -= experts * (layer.config.experts - layer.config.top_k) // layer.config.experts
    return 6 * met


def update(model: nn.Module, optimizer: Optimizer, loss: Tensor) -> None:
    """Make one step of training; backward adds the gradients of the losses of MoE layers, where there are any."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@dataclass
class Curve:
    """Held-out loss against what was spent; `tokens` and `flops` go on from where `before` ended."""

    name: str
    tokens: list[int] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train(
    name: str,
    model: Any,
    optimizer: Optimizer,
    text: Text,
    steps: int,
    *,
    seed: int,
    start: tuple[int, float] = (0, 0.0),
    every: int = 50,
    watch: Callable[[Any], None] = lambda model: None,
) -> Curve:
    """Train with the layers' losses added; measure every few steps and at the end.

    Args:
        name: Of the curve.
        model: Dense or converted.
        optimizer: Its optimizer.
        text: What to train and measure on.
        steps: Number of steps.
        seed: Order of the windows.
        start: Tokens and FLOPs spent before.
        every: Steps between two measurements.
        watch: Called with the model after each step.
    """
    curve, cost = Curve(name), flops_per_token(model)
    began = time.perf_counter()
    for step, windows in enumerate(text.batches(steps, seed)):
        if step % every == 0:
            _point(curve, start, step, cost, text.measure(model))
        update(model, optimizer, loss_of(model, windows))
        watch(model)
    _point(curve, start, steps, cost, text.measure(model))
    curve.seconds = time.perf_counter() - began
    print(f"{name}: {curve.losses[-1]:.3f} nats per byte after {steps} steps, {curve.seconds:.0f} s", flush=True)
    return curve


def _point(curve: Curve, start: tuple[int, float], step: int, cost: int, loss: float) -> None:
    curve.tokens.append(start[0] + step * TOKENS)
    curve.flops.append(start[1] + step * TOKENS * cost)
    curve.losses.append(loss)


def end_of(curve: Curve) -> tuple[int, float]:
    """Tokens and FLOPs spent at the end of a curve."""
    return curve.tokens[-1], curve.flops[-1]


def write_table(
    folder: Path,
    args: argparse.Namespace,
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    record: bool = True,
) -> None:
    """Print the table of a seed; put it between its markers in the README, and into the example's record if asked."""
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
    print(table)
    if args.quick:
        return
    seed = args.seed
    if record:
        records.keep(folder, seed, header, rows)
    section = f"<!-- seed {seed} -->\nSeed {seed}:\n\n{table}\n<!-- end of seed {seed} -->\n"
    readme = folder / "README.md"
    text = readme.read_text()
    marked = rf"<!-- seed {seed} -->.*<!-- end of seed {seed} -->\n"
    if re.search(marked, text, flags=re.DOTALL):
        text = re.sub(marked, lambda _: section, text, flags=re.DOTALL)
    else:
        end = [found.end() for found in re.finditer(r"<!-- end of seed \d+ -->\n", text)]
        text = f"{text[: end[-1]]}\n{section}{text[end[-1] :]}" if end else f"{text}\n{section}"
    readme.write_text(text)


def plot(
    path: Path,
    args: argparse.Namespace,
    *panels: tuple[str, Sequence[tuple[str, Sequence[float], Sequence[float]]]],
    y: str,
    top: float | None = None,
) -> None:
    """Draw panels side by side: (x label, lines), each line (name, xs, ys); `top` is where the y axis ends.

    Does nothing in a quick run, which therefore needs no matplotlib.
    """
    if args.quick:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False)
    for axes, (label, drawn) in zip(all_axes[0], panels, strict=True):
        for name, xs, ys in drawn:
            shown = [(x, value) for x, value in zip(xs, ys, strict=True) if top is None or value <= top]
            axes.plot(*zip(*shown, strict=True), marker=".", label=name)
        axes.set_xlabel(label)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
    all_axes[0][0].legend(fontsize=8)
    figure.suptitle(f"seed {args.seed}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
