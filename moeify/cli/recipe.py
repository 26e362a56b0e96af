"""Recipes: the arguments and options of a command as a YAML file, read with `--config` and printed with `--yaml`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

import click
import yaml
from click.core import ParameterSource

from moeify.cli.settings import RECIPE_SETTINGS, value_of
from moeify.errors import ConfigError
from moeify.files.limits import YAML_BYTES
from moeify.files.reading import read_bytes
from moeify.files.yaml_text import parse_yaml

Command = TypeVar("Command", bound=Callable[..., object])

_SET = "settings"  # the one option that is a mapping in a recipe
_OF_A_RUN = {"config", "dry_run", "as_json", "as_yaml", "resume", "overwrite", "workers", "part", "join",
             "ep", "dp", "tokens", "bandwidth", "flops"}  # fmt: skip
_EXAMPLE = "moeify convert SRC --experts 8 --top-k 2 --dry-run --yaml prints one"


def recipe_option(command: Command) -> Command:
    """Add `--config`: what stands in the file holds where nothing is typed."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,  # before the options that it has values for
        expose_value=False,
        callback=_take,
        help="Take SRC, DST and options from a YAML file, by their long names; what is typed wins.",
    )(command)


def _take(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is not None:
        found = read_recipe(path, ctx.command)
        ctx.meta[RECIPE_SETTINGS] = found.pop(_SET, ())
        ctx.default_map = found


def read_recipe(path: Path, command: click.Command) -> dict[str, object]:
    """Return what a recipe says, by the names of the command's parameters; what is empty is left out.

    Raises:
        ConfigError: It is no YAML, or has a field that the command does not know, or one of another kind.
        CheckpointError: It cannot be read.
    """
    try:
        recipe = parse_yaml(read_bytes(path, YAML_BYTES))
    except ValueError as error:
        raise ConfigError(f"{path} is not YAML ({error}): {_EXAMPLE}") from error
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path} is no recipe: expected lines such as `experts: 8`; {_EXAMPLE}")
    known = {_field(param): str(param.name) for param in command.params if param.name != "config"}
    found: dict[str, object] = {}
    for field, value in recipe.items():
        if field not in known:
            near = get_close_matches(str(field), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{path}: there is no field {field}: {hint}")
        if value != "":
            found[known[field]] = _settings(path, value) if known[field] == _SET else _one(path, field, value)
    return found


def recipe_text(ctx: click.Context) -> str:
    """Return what was typed, and what came from a recipe, as a recipe."""
    fields: dict[str, object] = {}
    for param in ctx.command.params:
        name, value = str(param.name), ctx.params.get(str(param.name))
        if name == _SET and value:
            fields[_field(param)] = {key: value_of(text) for key, _, text in (each.partition("=") for each in value)}
        elif ctx.get_parameter_source(name) != ParameterSource.DEFAULT and name not in _OF_A_RUN and value is not None:
            fields[_field(param)] = str(value) if isinstance(value, Path) else value
    text: str = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return text


def _field(param: click.Parameter) -> str:
    """Return the name of a parameter in a recipe: `src`, `top-k`."""
    return max(param.opts, key=len).removeprefix("--")


def _one(path: Path, field: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{path}: {field} is a {_kind(value)}: expected one value")
    return value


def _settings(path: Path, value: object) -> tuple[str, ...]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: set is a {_kind(value)}: expected a mapping such as `z_loss: 1e-3`")
    return tuple(f"{field}={_one(path, f'set.{field}', text)}" for field, text in value.items())


def _kind(value: object) -> str:
    return "mapping" if isinstance(value, dict) else "list" if isinstance(value, list) else "text"
