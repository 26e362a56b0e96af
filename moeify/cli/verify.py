"""`moeify verify`: the proof of a conversion, on whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moeify.cli.options import json_option, source_options
from moeify.errors import CheckpointError, VerificationError
from moeify.files.reading import exists
from moeify.files.text import start_of_text

if TYPE_CHECKING:
    from moeify.checkpoint.source import Accepted


@click.command()
@click.argument("dense", type=click.Path(path_type=Path))
@click.argument("moe", type=click.Path(path_type=Path))
@click.option(
    "--text", type=click.Path(path_type=Path), help="Run on the start of this file instead of random token ids."
)
@json_option
@source_options
def verify(dense: Path, moe: Path, text: Path | None, as_json: bool, accepted: Accepted) -> None:
    """Compare every MoE layer of MOE with its dense FFN in DENSE, and the logits; exit 1 above tolerance.

    A layer and its FFN get the same input, and compute in float64; the logits are those of float32. Where moeify.json
    lies beside MOE, its stored tensors must be what that plan makes of DENSE. Every tensor of MOE must have its place,
    and every place of both models its tensor. A few layers are in memory at a time; of a GGUF file, all.
    """
    from moeify.cli import display
    from moeify.cli.quiet import without_bars
    from moeify.proving.whole import verify_checkpoints

    for path in (dense, moe):
        if not exists(path):
            raise CheckpointError(f"{path} does not exist: give two model folders (DENSE may be a GGUF file)")
    with without_bars():
        report = verify_checkpoints(dense, moe, text=None if text is None else start_of_text(text), **accepted)
    for line in report.warnings():
        display.warnings().print(line)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        display.stdout().print(report.summary())
    if not report.passed:
        raise VerificationError(report.failure())
