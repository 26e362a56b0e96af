"""Hold the proof to both of its promises, and write docs/proof.json and docs/proof.md.

    python -m sweeps.proofs            all (half an hour)
    python -m sweeps.proofs --page     only write the page

No right conversion is refused, whatever the inputs: each conversion is proved on 1,000 random ones. Every wrong one is:
each damage of `sweeps.corruptions` is, and where its numbers can show it, without the plan that lies beside it too.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import moeify
from benchmarks.record import measured, read, write
from moeify.checkpoint.source import open_source
from moeify.cli.demo import model_file
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import Output, convert_checkpoint, plan_checkpoint
from moeify.conversion.dense import DenseCheckpoint
from moeify.hub.loading import load
from moeify.measure import TOLERANCE
from sweeps.corruptions import COPY, CORRUPTIONS, CUT, build, convert, make, refusal
from sweeps.models import DOCS

RECORD, PAGE = DOCS / "proof.json", DOCS / "proof.md"
CODE = ("moeify/proving", "moeify/conversion")
INPUTS, BATCH = 1000, 50
SMOLLM2 = "SmolLM2-135M"
CONVERSIONS: dict[str, MoEConfig] = {
    "llama": COPY, "mistral": COPY, "qwen2": COPY, "qwen3": CUT, "gemma": COPY, "phi3": COPY, "gpt2": CUT,
    "gpt_neox": COPY,
}  # fmt: skip


@dataclass
class Tally:
    """What the proofs of one conversion gave.

    Attributes:
        target: Format of the MoE.
        inputs: Sequences that were tried.
        refused: How many of them were refused.
        layer: Largest difference of a layer, in float64.
        outside: Largest difference outside of the layers.
        whole: Largest difference of the logits.
        above: How many proofs have logits above the tolerance of one layer, which once refused them.
    """

    target: str
    inputs: int = 0
    refused: int = 0
    layer: float = 0.0
    outside: float = 0.0
    whole: float = 0.0
    above: int = 0

    def add(self, report: moeify.VerifyReport, sequences: int) -> None:
        """Count one proof."""
        if not report.layers or any(layer.dtype != "float64" for layer in report.layers) or report.outside is None:
            raise AssertionError(f"{self.target}: layers were not compared in float64")
        self.inputs += sequences
        self.refused += 0 if report.passed else sequences
        self.layer = max(self.layer, *(layer.relative for layer in report.layers))
        self.outside = max(self.outside, report.outside)
        self.whole = max(self.whole, report.relative)
        self.above += report.relative > TOLERANCE["float32"]


def random_ids(count: int, vocab_size: int) -> Iterator[Tensor]:
    """Yield token ids (B, L) of random shapes."""
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        batch, length = (int(torch.randint(1, most, (), generator=generator)) for most in (4, 24))
        yield torch.randint(0, vocab_size, (batch, length), generator=generator)


def prove(name: str, inputs: int = INPUTS) -> Tally:
    """Convert a small model's checkpoint and prove it on many inputs."""
    with tempfile.TemporaryDirectory() as folder:
        dense, moe = convert(build(name), Path(folder), CONVERSIONS[name])
        models = load(dense), load(moe)
    tally = Tally(models[1].config.model_type)
    for ids in random_ids(inputs, 101):
        tally.add(moeify.verify(*models, {"input_ids": ids}), 1)
    return tally


def prove_smollm2() -> Tally:
    """Convert a real model to Mixtral and prove it on batches of short sequences, and on the token ids 5 to 68."""
    file = model_file()
    with tempfile.TemporaryDirectory() as folder, open_source(file) as source:
        opened = DenseCheckpoint(source)
        moe = Path(folder) / "moe"
        convert_checkpoint(opened, plan_checkpoint(opened, MoEConfig(8, 2)), Output(moe, 10**10))
        models: tuple[nn.Module, nn.Module] = load(file, dtype=torch.float32), load(moe, dtype=torch.float32)
        generator, tally = torch.Generator().manual_seed(0), Tally("mixtral")
        tally.add(moeify.verify(*models, {"input_ids": torch.arange(5, 69)[None]}), 1)
        for _ in range(0, INPUTS, BATCH):
            ids = torch.randint(0, 49152, (BATCH, 8), generator=generator)
            tally.add(moeify.verify(*models, {"input_ids": ids}), len(ids))
    return tally


def refusals(name: str) -> dict[str, str | None]:
    """Return why a corruption is refused, with the plan beside it and without; None if it is not."""
    with tempfile.TemporaryDirectory() as folder:
        dense, moe = make(name, Path(folder))
        with_plan = refusal(dense, moe)
        (moe / "moeify.json").unlink()
        without = None if CORRUPTIONS[name].by_plan else refusal(dense, moe)
    # a path is another one each time
    return {key: None if why is None else why.replace(folder, "…") for key, why in
            (("with the plan", with_plan), ("without", without))}  # fmt: skip


def page(found: Mapping[str, Any]) -> str:
    """Return the document."""
    right, wrong = found["right"], found["wrong"]
    inputs, refused = (sum(row[what] for row in right.values()) for what in ("inputs", "refused"))
    text = f"""# The proof, proved

How a proof works is told in [verify.md](verify.md). Written by `python -m sweeps.proofs`.

Right conversions: {inputs:,} random inputs, {refused} refused. *layer* is the largest difference of a layer from
its dense FFN, in float64. *outside* is what is left of a difference when every layer answers with what the
dense FFN gave, and *logits* is the difference of the whole, both in float32. *above* counts the proofs whose
logits differ by more than {TOLERANCE["float32"]:.0e} by rounding alone, which a gate on logits would refuse.

| model | becomes | inputs | refused | layer | outside | logits | above |
|---|---|--:|--:|---|---|---|--:|
"""
    for name, row in right.items():
        numbers = " | ".join(f"{row[what]:.1e}" for what in ("layer", "outside", "whole"))
        text += f"| {name} | {row['target']} | {row['inputs']} | {row['refused']} | {numbers} | {row['above']} |\n"
    text += f"""
Wrong conversions: {len(wrong)} kinds, {len(missed(wrong))} not refused. The second reason is that of the numbers
alone, without moeify.json. It is empty where only the stored tensors can show what is wrong: the method
promises no equality, or the router of equal experts may choose as it likes.

| what is wrong | why it is refused | without moeify.json |
|---|---|---|
"""
    for name, row in wrong.items():
        text += f"| {name} | {row['with the plan'] or 'not refused'} | {row['without'] or ''} |\n"
    return text


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return how many proofs there were of how many conversions, and how many of either kind ended wrongly."""
    right, wrong = found["right"], found["wrong"]
    refused = sum(row["refused"] for row in right.values())
    inputs = {row["inputs"] for row in right.values()}
    return {"conversions": len(right), "inputs_of_each": min(inputs), "refused": refused, "wrong": len(wrong),
            "missed": len(missed(wrong))}  # fmt: skip


def missed(wrong: Mapping[str, Mapping[str, str | None]]) -> list[str]:
    """Return the corruptions that are not refused where they must be."""
    return [name for name, row in wrong.items()
            if not row["with the plan"] or not (row["without"] or CORRUPTIONS[name].by_plan)]  # fmt: skip


def main() -> None:
    """Prove everything, unless told otherwise, and write record and page."""
    if sys.argv[1:] != ["--page"]:
        untyped: Any = transformers.utils.logging
        untyped.disable_progress_bar()
        torch.set_num_threads(1)
        found: dict[str, Any] = {"wrong": {name: refusals(name) for name in CORRUPTIONS}, "right": {}}
        for name in CONVERSIONS:
            found["right"][name] = asdict(prove(name))
            print(name, found["right"][name], flush=True)
        found["right"][SMOLLM2] = asdict(prove_smollm2())
        write(
            measured("Proofs of right conversions, and of wrong ones", "nothing else", CODE, summary(found), found),
            RECORD,
        )
    PAGE.write_text(page(read(RECORD).runs))


if __name__ == "__main__":
    main()
