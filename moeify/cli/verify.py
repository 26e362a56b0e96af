"""`moeify verify`: the proof of a conversion, on whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

import click

from moeify.cli.options import json_option
from moeify.errors import CheckpointError, VerificationError
from moeify.files.limits import TEXT_CHARACTERS
from moeify.files.reading import exists


@click.command()
@click.argument("dense", type=click.Path(path_type=Path))
@click.argument("moe", type=click.Path(path_type=Path))
@click.option("--text", type=click.File(), help="Run on the start of this text instead of random token ids.")
@json_option
def verify(dense: Path, moe: Path, text: TextIO | None, as_json: bool) -> None:
    """Compare the logits of DENSE and MOE in float32; exit 1 above tolerance.

    Every tensor of both checkpoints must have its place: a missing or unexpected one is an error.
    """
    from moeify.cli import display
    from moeify.cli.quiet import without_bars
    from moeify.proving.proof import verify_checkpoints

    for path in (dense, moe):
        if not exists(path):
            raise CheckpointError(f"{path} does not exist: give two model folders (DENSE may be a GGUF file)")
    with without_bars():
        report = verify_checkpoints(dense, moe, text=None if text is None else text.read(TEXT_CHARACTERS))
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        display.stdout().print(report.summary())
    if not report.passed:
        raise VerificationError("the MoE differs from the dense model by more than the tolerance")
