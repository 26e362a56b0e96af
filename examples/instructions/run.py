"""Many tasks first, then one: against training on the one task alone, for a dense model and for an MoE."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moeify
from examples import small_lm as lm

HERE = Path(__file__).parent
CONFIG = moeify.MoEConfig(experts=8, top_k=2, aux_loss=0.01)
LETTERS = "abcdefghij"
LENGTH = 18  # bytes of an instruction with its answer
EXAMPLES = 64  # of the one task, to learn from
TASKS: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "upper": str.upper,
    "double": lambda word: "".join(c + c for c in word),
    "next": lambda word: "".join(LETTERS[(LETTERS.index(c) + 1) % 10] for c in word),
    "last": lambda word: word[-1],
    "swap": lambda word: word[1:] + word[0],
    "sort": lambda word: "".join(sorted(word)),
    "reverse": lambda word: word[::-1],
}
ONE = "reverse"


def main() -> None:
    """Train each way, write the table and the plot."""
    args = lm.options(__doc__)
    rng = random.Random(args.seed)
    one = [(ONE, word(rng)) for _ in range(EXAMPLES)]
    held_out = [(ONE, word(random.Random(10_000 + i))) for i in range(300)]
    many, few = round(400 * args.steps), round(120 * args.steps)
    torch.manual_seed(args.seed)
    start = lm.dense_model()
    rows, lines = [], []
    for kind in ("dense", "MoE"):
        alone, staged = (model_of(kind, start, args.seed) for _ in range(2))
        names = f"{kind}, one task alone", f"{kind}, many tasks, then one"
        began = time.perf_counter()
        first = fit(alone, lambda: rng.sample(one, lm.BATCH), many + few, held_out)
        fit(staged, lambda: [(rng.choice([t for t in TASKS if t != ONE]), word(rng)) for _ in range(lm.BATCH)], many,
            held_out)  # fmt: skip
        zero_shot = accuracy(staged, held_out)
        second = fit(staged, lambda: rng.sample(one, lm.BATCH), few, held_out)
        rows += [[names[0], "-", f"{first[-1]:.1%}"], [names[1], f"{zero_shot:.1%}", f"{second[-1]:.1%}"]]
        lines += [(names[0], steps(first, many + few), first), (names[1], steps(second, few, many), second)]
        print(f"{kind}: {time.perf_counter() - began:.0f} s", flush=True)
    lm.write_table(HERE, args, ["training", "before the one task", "right answers at the end"], rows)
    lm.plot(HERE / "accuracy.png", args, ("step", lines), y=f"right answers to `{ONE}`, held-out words")


def model_of(kind: str, start: Any, seed: int) -> Any:
    """The dense model, or the MoE that copies it."""
    model = copy.deepcopy(start)
    return model if kind == "dense" else moeify.convert(model, replace(CONFIG, seed=seed))


def word(rng: random.Random) -> str:
    """Three or four letters."""
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 4)))


def windows(examples: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Bytes (B, LENGTH) of `task:word=answer` and zeros, and a mask of the answer with the zero that ends it."""
    ids, answers = torch.zeros(len(examples), LENGTH, dtype=torch.int64), torch.zeros(len(examples), LENGTH)
    for row, (task, given) in enumerate(examples):
        question, answer = f"{task[:3]}:{given}=", TASKS[task](given)
        text = lm.as_bytes(question + answer)
        ids[row, : len(text)] = text
        answers[row, len(question) : len(text) + 1] = 1
    return ids, answers.bool()


def fit(model: Any, draw: Callable[[], list[tuple[str, str]]], count: int, held_out: Any) -> list[float]:
    """Train on batches of examples; return the accuracy on held-out words now and then."""
    optimizer, history = lm.optimizer_for(model), []
    for step in range(count):
        if step % 50 == 0:
            history.append(accuracy(model, held_out))
        ids, answers = windows([example for _ in range(4) for example in draw()])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[answers[:, 1:]], ids[:, 1:][answers[:, 1:]])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return [*history, accuracy(model, held_out)]


@torch.no_grad()
def accuracy(model: Any, examples: list[tuple[str, str]]) -> float:
    """Share of examples whose answer is predicted byte for byte."""
    ids, answers = windows(examples)
    model.eval()
    right = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1) == ids[:, 1:]
    model.train()
    return float((right | ~answers[:, 1:]).all(-1).float().mean())


def steps(history: list[float], count: int, start: int = 0) -> list[float]:
    """The steps at which `fit` measured."""
    return [start + min(50.0 * i, count) for i in range(len(history))]


if __name__ == "__main__":
    main()
