"""`moeify export`: a checkpoint becomes an ONNX file, with its proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moeify.cli.options import LAYERS, Dtype, json_option, source_options
from moeify.cli.settings import config_from, config_options
from moeify.errors import CheckpointError
from moeify.export.targets import FLOATS, TARGETS, quantizations
from moeify.files.staging import check_folder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from moeify.checkpoint.source import Accepted
    from moeify.config import MoEConfig
    from moeify.export.report import OnnxReport

_TARGETS = ", ".join(f"{target.name} ({target.about})" for target in TARGETS.values())
_DTYPES = ", ".join(f"{target.default_dtype} for {target.name}" for target in TARGETS.values())


@click.command()
@click.argument("src", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--target", default="cpu", show_default=True, help=f"{_TARGETS}.")
@click.option("--quantize", help=f"Store the experts' weights in {' or '.join(quantizations())}.")
@click.option("--dtype", type=Dtype(FLOATS), help=f"[default: {_DTYPES}]")
@config_options
@click.option("--layers", default="all", show_default=True, help=f"With --experts: {LAYERS}.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, if it is a file or a model folder.")
@json_option
@source_options
def export(
    src: Path, out: Path, target: str, quantize: str | None, dtype: str | None, layers: str, overwrite: bool,
    as_json: bool, accepted: Accepted, **settings: object,
) -> None:  # fmt: skip
    """Export the checkpoint SRC to the ONNX file OUT, or, without .onnx in its name, to a folder.

    SRC is a converted model, an MoE of transformers, or a dense model (with --experts and --top-k, or --preset, it is
    converted on the way). OUT appears after ONNX Runtime gave what PyTorch gives, on shapes that it did not see before.
    A folder holds what onnxruntime-genai and optimum look for besides: configs and tokenizer.
    """
    from moeify.cli import display
    from moeify.cli.quiet import without_bars
    from moeify.export.onnx_file import MODEL_FILE, check_request

    typed = any(value not in (None, ()) for value in settings.values())
    config = config_from(settings) if typed else None
    file = out if out.suffix == ".onnx" else out / MODEL_FILE
    if file != out:
        check_folder(out, overwrite=overwrite)
    request = check_request(file, target, quantize, dtype, overwrite=overwrite)  # before minutes of loading
    from moeify.export.folder import export_folder  # needs the packages that were just checked
    from moeify.export.pipeline import export as export_file

    tokenizer = _tokenizer(src, accepted)  # what is wrong with it is told before minutes of work
    with without_bars():
        model = _load(src, request.dtype, config, layers, accepted)
        entries = {"source": src.name, **_text_entries(model, tokenizer)}
        if file == out:
            report = export_file(model, request, None, entries)
        else:
            report = export_folder(model, request, tokenizer, entries)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
        return
    console = display.stdout()
    console.print(_operators(report))
    console.print(report.summary())
    console.print(f"written to {out}, for onnxruntime {report.requires} or newer")


def _load(src: Path, dtype: str, config: MoEConfig | None, layers: str, accepted: Accepted) -> nn.Module:
    import torch

    from moeify.conversion.module import convert
    from moeify.hub.loading import load_sparingly

    model = load_sparingly(src, getattr(torch, dtype), **accepted)
    return model if config is None else convert(model, config, layers)


def _tokenizer(src: Path, accepted: Accepted) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer, if there is one, as for a vision model there is not; say so if it does not load."""
    from moeify.checkpoint.source import open_source
    from moeify.cli import display
    from moeify.cli.quiet import without_bars
    from moeify.pretrained import load_tokenizer

    with without_bars(), open_source(src, **accepted) as source:
        place = source.tokenizer_path
    if place is None:
        return None
    try:
        with without_bars():
            return load_tokenizer(place)
    except CheckpointError as error:
        display.warnings().print(f"warning: {error}; the output has no tokenizer")
        return None


def _text_entries(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, str]:
    """What `moeify run` needs: the tokenizer, and the tokens that end a text."""
    from moeify.export.folder import end_tokens

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}  # it has no file of its own
    return {"tokenizer": backend.to_str(), "eos_token_ids": " ".join(map(str, end_tokens(model, tokenizer)))}


def _operators(report: OnnxReport) -> str:
    """Return how many operators there are, and those that are not of standard ONNX; `--json` has all."""
    counts = report.operators
    special = [f"{count} {name}" for name, count in counts.items() if "::" in name]
    among = f", among them {', '.join(special)}" if special else ""
    return f"{sum(counts.values())} operators{among}"
