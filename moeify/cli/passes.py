"""`moeify passes`: the graph passes, each with its one-line summary and what it does to a graph."""

from __future__ import annotations

from textwrap import fill, indent

import click


@click.command()
def passes() -> None:
    """List the graph passes: what each does, before and after, and what it refuses."""
    from moeify.passes.catalog import describe

    for entry in describe():
        click.secho(f"{entry.name}  ", bold=True, nl=False)
        click.echo(entry.summary)
        click.echo(f"\n  before\n{indent(entry.before, '    ')}\n  after\n{indent(entry.after, '    ')}")
        for title, text in (("note", entry.notes), ("refuses", entry.refuses)):
            if text:
                click.echo(f"  {title}\n{fill(text, 110, initial_indent='    ', subsequent_indent='    ')}")
        for name, meaning in entry.options.items():
            click.echo(f"  option {name}: {meaning}")
        click.echo()
