"""`moeify report`: a page to look at, of a model or of a training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moeify.cli.options import json_option, source_options
from moeify.files.staging import check_file, write_whole
from moeify.files.text import start_of_text

if TYPE_CHECKING:
    from moeify.checkpoint.source import Accepted
    from moeify.report.data import Report


@click.command()
@click.argument("src")
@click.argument("dense", required=False)
@click.option("--text", type=click.Path(path_type=Path), help="Run on the start of this file. [default: Python's docs]")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write the page. [default: report.html]")
@click.option("--overwrite", is_flag=True, help="Replace the page if it exists.")
@json_option
@source_options
def report(
    src: str,
    dense: str | None,
    text: Path | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    accepted: Accepted,
) -> None:
    """Make a page about SRC: what it is, what it costs, which experts work, where tokens go, and its proof.

    SRC is any MoE, of moeify or not (a folder, a GGUF file or a hub id), or the RUN.jsonl that RoutingCallback wrote.
    It is run on a text and, where DENSE is given, compared with that.
    """
    from moeify.cli import display

    if as_json and output is not None:
        raise click.UsageError("--json goes without --output: it is printed")
    path = output or Path("report.html")
    if not as_json:
        check_file(path, overwrite=overwrite)
    made = _made(src, dense, text, accepted)
    for note in made.notes:
        display.stderr().print(f"note: {note}")
    if as_json:
        click.echo(json.dumps(made.to_dict(), indent=2))
        return
    write_page(made, path)
    for finding in made.findings:
        display.stdout().print(finding)
    display.stderr().print(f"written to {path}")


def write_page(made: Report, path: Path) -> None:
    """Write the page of a report, over the one that is there."""
    from moeify.report.render import page

    write_whole(path, page(made).encode("utf-8", "replace"))


def _made(src: str, dense: str | None, text: Path | None, accepted: Accepted) -> Report:
    if src.endswith(".jsonl"):
        from moeify.report.run import collect_run

        if dense is not None or text is not None:
            raise click.UsageError(f"{src} is the log of a run, which goes without DENSE and --text")
        return collect_run(Path(src))
    from moeify.cli.quiet import without_bars
    from moeify.report.collect import collect

    said = None if text is None else start_of_text(text)
    with without_bars():
        return collect(src, dense, text=said, text_name=text.name if text else "", **accepted)
