"""`moeify inspect`: what is in a model, and what an MoE of it would cost."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moeify.cli.options import example_inputs_option, json_option, source_options


@click.command()
@click.argument("src")
@click.option("--experts", default=8, show_default=True, help="Experts to count the cost for.")
@click.option("--top-k", default=2, show_default=True, help="Experts per token to count the cost for.")
@example_inputs_option
@json_option
@source_options
def inspect(
    src: str,
    experts: int,
    top_k: int,
    example_inputs: Path | None,
    as_json: bool,
    allow_pickle: bool,
    trust_remote_code: bool,
) -> None:
    """Show the FFNs found in SRC, the look-alikes with reasons, and what an MoE would cost.

    SRC is a folder in Hugging Face layout, a GGUF file, or a hub id. No weight is read.
    """
    from moeify.checkpoint.source import open_source
    from moeify.cli import display
    from moeify.config import MoEConfig
    from moeify.conversion.dense import DenseCheckpoint
    from moeify.conversion.summary import summarize
    from moeify.tracing.given_inputs import read_inputs

    inputs = None if example_inputs is None else read_inputs(example_inputs)
    with open_source(src, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code) as source:
        seen = summarize(DenseCheckpoint(source, inputs), MoEConfig(experts, top_k))
    if as_json:
        click.echo(json.dumps(seen.to_dict(), indent=2))
        return
    console, found = display.stdout(), seen.checkpoint.inspection
    console.print(f"{src}: {seen.checkpoint.source.model_type}, {len(found.ffns)} dense FFNs")
    if found.ffns:
        console.print(display.inspection_table(found))
    if found.refused:
        console.print()
        console.print(display.refusals_table(found))
    if seen.moe is not None:
        console.print()
        console.print(display.cost_table((("dense", seen.dense), (f"{experts} experts, top-{top_k}", seen.moe))))
    elif seen.obstacle:
        console.print()
        console.print(f"cannot be converted in place: {seen.obstacle}")
