"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., object])


def source_options(command: Command) -> Command:
    """Add the options of every command that opens a dense checkpoint."""
    command = click.option(
        "--trust-remote-code", is_flag=True, help="Accept a model whose config names Python code of its own."
    )(command)
    return click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model.bin, read with weights_only.")(
        command
    )


example_inputs_option = click.option(
    "--example-inputs",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Arguments of the model's forward by name (.json, .safetensors), where they cannot be guessed.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, nothing else on stdout.")
