"""SmolLM2-135M goes on as an MoE, against going on dense, for minutes of one CPU thread each.

    python -m examples.smollm2.run --minutes 60 --seeds 2     # four runs; what has its record is not run again
    python -m examples.smollm2.run --plot                     # tables and pictures of the records that are there

Both get the same windows of the same texts, the same optimizer and rate. Time is CPU time, so that a busy machine does
not change the comparison much. A run that was cut off begins anew.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

import moeify
from benchmarks.record import about
from examples import records
from examples import small_lm as lm
from examples.smollm2.pictures import load_picture, loss_picture, table
from moeify.cli.demo import model_file
from moeify.layers import MoELayer
from moeify.pretrained import load_tokenizer
from moeify.training.stats import RoutingWindow

HERE = Path(__file__).parent
FOLDER = HERE / "records"
VARIANTS = ("MoE", "dense")
CONFIG, LAYERS = moeify.MoEConfig(experts=4, top_k=2, aux_loss=0.01), "every:2"
ROWS, LENGTH, HELD_OUT = 4, 128, 16  # windows of a step, tokens of a window, windows of each text to measure on
# SmolLM2 was trained at 3e-3 with two million tokens a step; the square root of the ratio of tokens gives 5e-5.
RATE, WARMUP = 5e-5, 20


@dataclass(frozen=True)
class Text:
    """A text in tokens: what is trained on, and windows of other documents, (HELD_OUT, LENGTH + 1)."""

    ids: Tensor
    held_out: Tensor

    def windows(self, count: int, generator: torch.Generator) -> Tensor:
        """Random windows to train on, (count, LENGTH + 1)."""
        starts = torch.randint(len(self.ids) - LENGTH, (count,), generator=generator).tolist()
        return torch.stack([self.ids[start : start + LENGTH + 1] for start in starts])


@dataclass(frozen=True)
class Setting:
    """What is run: a dense model and texts in its tokens, so many minutes, a measurement every few steps."""

    model: Callable[[], Any]
    texts: dict[str, Text]
    folder: Path
    minutes: float
    every: int = 25


@dataclass
class Record:
    """A run: what it was, and what was measured at its points."""

    variant: str
    seed: int
    minutes: float
    about: dict[str, Any]
    settings: dict[str, Any]
    parameters: int = 0
    flops_per_token: int = 0
    whole: bool = False
    points: list[dict[str, Any]] = field(default_factory=list)


def main() -> None:
    """Train what has no record yet, or draw what there is."""
    args = options()
    torch.set_num_threads(1)
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            run_all(Setting(lm.dense_model, texts(lm.as_bytes), Path(folder), minutes=0, every=2), seeds=1)
            write(Path(folder), quick=True)
    elif args.plot:
        write(FOLDER, quick=False)
    else:
        path = model_file()
        tokenizer = load_tokenizer(path)
        found = texts(lambda text: torch.tensor(tokenizer(text)["input_ids"]))
        run_all(Setting(lambda: moeify.load(path, dtype=torch.float32), found, FOLDER, args.minutes), args.seeds)


def options() -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="CPU minutes of training of each run (60)")
    parser.add_argument("--seeds", type=int, default=2, help="how many seeds (2)")
    parser.add_argument("--plot", action="store_true", help="write the tables and pictures of the records; no training")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few steps; writes no file")
    return parser.parse_args()


def texts(tokens_of: Callable[[str], Tensor]) -> dict[str, Text]:
    """Prose and code that come with Python; every tenth document is held out."""
    topics = pydoc_data.topics.topics
    modules = sorted(Path(argparse.__file__).parent.glob("*.py"))
    documents = {
        "reference": [topics[name] for name in sorted(topics)],
        "source": [path.read_text(encoding="utf-8", errors="ignore")[:20_000] for path in modules],
    }
    return {name: text_of(found, tokens_of) for name, found in documents.items()}


def text_of(documents: list[str], tokens_of: Callable[[str], Tensor]) -> Text:
    """One text; the windows to measure on are spread over what is held out."""
    trained = [document for number, document in enumerate(documents) if number % 10]
    held_out = tokens_of("\n\n".join(documents[::10]))
    starts = torch.linspace(0, len(held_out) - LENGTH - 1, HELD_OUT).long().tolist()
    return Text(tokens_of("\n\n".join(trained)), torch.stack([held_out[s : s + LENGTH + 1] for s in starts]))


def run_all(setting: Setting, seeds: int) -> None:
    """Make each run that has no whole record of at least as many minutes."""
    setting.folder.mkdir(exist_ok=True)
    for seed in range(seeds):
        for variant in VARIANTS:
            path = setting.folder / f"{variant.lower()}-{seed}.json"
            before = json.loads(path.read_text()) if path.exists() else {"whole": False}
            if before["whole"] and before["minutes"] >= setting.minutes:
                print(f"{path.name} is whole", flush=True)
            else:
                run(setting, variant, seed, path)


def run(setting: Setting, variant: str, seed: int, path: Path) -> None:
    """Train one model, and write its record at each point."""
    settings = {"experts": CONFIG.experts, "top_k": CONFIG.top_k, "layers": LAYERS, "rate": RATE, "warmup": WARMUP,
                "rows": ROWS, "length": LENGTH}  # fmt: skip
    record = Record(variant, seed, setting.minutes, about(records.code_of(HERE)), settings)
    torch.manual_seed(seed)
    model = setting.model().train()
    if variant == "MoE":
        moeify.convert(model, replace(CONFIG, seed=seed), LAYERS)
    record.parameters, record.flops_per_token = sum(p.numel() for p in model.parameters()), lm.flops_per_token(model)
    optimizer = AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP, 1.0))
    generator, seconds = torch.Generator().manual_seed(seed), [0.0]
    while True:
        record.points.append(point(model, setting.texts, seconds))
        record.whole = len(seconds) > 1 and sum(seconds) >= 60 * setting.minutes
        records.write_json(path, asdict(record))
        shown = {name: round(value, 3) for name, value in record.points[-1].items() if name != "load"}
        print(variant, seed, shown, flush=True)
        if record.whole:
            return
        for _ in range(setting.every):
            rows = [text.windows(ROWS // len(setting.texts), generator) for text in setting.texts.values()]
            began = time.process_time()
            lm.update(model, optimizer, lm.loss_of(model, torch.cat(rows)))
            warmup.step()
            seconds.append(time.process_time() - began)


@torch.no_grad()
def point(model: nn.Module, found: dict[str, Text], seconds: list[float]) -> dict[str, Any]:
    """Measure: steps and CPU seconds so far, loss in nats per token on each text, the load of each layer's experts."""
    model.eval()
    window, losses = RoutingWindow(), {}
    is_moe = any(isinstance(module, MoELayer) for module in model.modules())
    for name, text in found.items():
        parts = []
        for rows in torch.split(text.held_out, ROWS):
            parts.append(float(lm.loss_of(model, rows)))
            if is_moe:
                window.add(model)
        losses[name] = sum(parts) / len(parts)
    model.train()
    steps = len(seconds) - 1
    return {
        "step": steps, "tokens": steps * ROWS * LENGTH, "seconds": sum(seconds), "a step": median(seconds[1:] or [0.0]),
        **losses, "loss": sum(losses.values()) / len(losses),
        "load": {path: stats.load for path, stats in window.stats().items()},
    }  # fmt: skip


def write(folder: Path, *, quick: bool) -> None:
    """Write the table of each seed, and the pictures."""
    made = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    for seed in sorted({record["seed"] for record in made}):
        args = argparse.Namespace(seed=seed, quick=quick)
        header, rows = table([record for record in made if record["seed"] == seed])
        lm.write_table(HERE, args, header, rows, record=False)  # each run has its own
    if not quick:
        loss_picture(made, HERE / "loss.png")
        load_picture(next(record for record in made if record["variant"] == "MoE"), HERE / "load.png")


if __name__ == "__main__":
    main()
