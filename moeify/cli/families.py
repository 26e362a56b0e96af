"""`moeify families`: the native formats, and which of them a checkpoint can become exactly."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from moeify.cli.options import json_option, source_options

if TYPE_CHECKING:
    from moeify.checkpoint.source import Accepted


@click.command()
@click.argument("src", required=False)
@click.option("--layers", default="all", show_default=True, help="all, every:N, last:N, first:N, 0,3-7, or a regex.")
@json_option
@source_options
def families(src: str | None, layers: str, as_json: bool, accepted: Accepted) -> None:
    """List the native formats with the engines that run them; for SRC, which are exact, and what the others fail.

    SRC is a folder in Hugging Face layout, a GGUF file, or a hub id. No weight is read.
    """
    from moeify.checkpoint.source import open_source
    from moeify.cli import display
    from moeify.conversion.dense import DenseCheckpoint
    from moeify.conversion.summary import native_targets
    from moeify.families.table import FAMILIES

    if src is None:
        found = {name: ", ".join(family.sources) for name, family in FAMILIES.items()}
        title = "made from"
    else:
        with open_source(src, **accepted) as source:
            found = {name: why or "exact" for name, why in native_targets(DenseCheckpoint(source), layers).items()}
        title = "for this checkpoint"
    if as_json:
        data = {name: {"engines": list(FAMILIES[name].engines), title: said} for name, said in found.items()}
        click.echo(json.dumps(data, indent=2))
        return
    console = display.stdout()
    for name, said in found.items():
        lines = [f"{name}: {title} {said}" if src is None else f"{name}: {said}"]
        lines += [f"  engines: {', '.join(FAMILIES[name].engines)}"]
        for line in display.wrapped(lines, console.width):
            console.print(line)
