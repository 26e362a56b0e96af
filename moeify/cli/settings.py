"""The options that make a `MoEConfig`, shared by commands that convert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from moeify.config import MoEConfig
from moeify.config.choice import words
from moeify.config.presets import PRESETS
from moeify.errors import ConfigError

F = TypeVar("F", bound=Callable[..., object])

_OPTIONS = {"experts", "top_k", "method", "granularity", "shared_experts", "router", "seed"}
_FIELDS = ", ".join(field for field in MoEConfig.__dataclass_fields__ if field not in _OPTIONS)
_METHODS, _ROUTERS = (", ".join(words(f"moeify.{package}")) for package in ("methods", "routers"))
_WORDS = {"true": True, "false": False, "none": None, "null": None}
RECIPE_SETTINGS = "moeify.set"  # where click's context keeps what a recipe sets


def _with_recipe(ctx: click.Context, _: click.Parameter, typed: tuple[str, ...]) -> tuple[str, ...]:
    """Add what a recipe sets and nobody typed."""
    names = {text.partition("=")[0] for text in typed}
    kept = (text for text in ctx.meta.get(RECIPE_SETTINGS, ()) if text.partition("=")[0] not in names)
    return (*kept, *typed)


def config_options(command: F) -> F:
    """Add the options that `config_from` takes."""
    for option in reversed(
        (
            click.option("--experts", type=int, help="Experts in each converted layer."),
            click.option("--top-k", type=int, help="Experts that each token visits."),
            click.option("--method", help=f"How experts are made: {_METHODS}.  [default: {MoEConfig.method}]"),
            click.option("--granularity", type=int, help="Cut each FFN into this many experts.  [default: 1]"),
            click.option("--shared-experts", type=int, help="Experts that every token visits besides.  [default: 0]"),
            click.option("--preset", type=click.Choice(PRESETS), help="Start from the settings of a paper."),
            click.option("--router", help=f"What chooses experts: {_ROUTERS}.  [default: {MoEConfig.router}]"),
            click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE",
                         callback=_with_recipe,
                         help="Another field of MoEConfig, or an option of the router or the method, such as "
                              "z_loss=1e-3, router.bias_rate=1e-3, method.share=0.3; may be repeated. The fields are "
                              f"{_FIELDS}."),
            click.option("--seed", type=int, help="Start of all random numbers.  [default: 0]"),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def config_from(options: dict[str, Any]) -> MoEConfig:
    """Make the settings from what was typed; what was not typed is the preset's, or the default.

    Raises:
        ConfigError: A value is wrong, or there is no such field.
        UsageError: A preset was not given, and the numbers of experts neither.
    """
    apart = {"preset", "settings"}
    typed = {name: value for name, value in options.items() if name not in apart and value is not None}
    for text in options["settings"]:
        _add_setting(typed, text)
    preset = options["preset"]
    if "experts" not in typed or ("top_k" not in typed and preset is None):
        raise click.UsageError("--experts and --top-k are needed: for example --experts 8 --top-k 2")
    return MoEConfig(**typed) if preset is None else getattr(MoEConfig, preset)(**typed)


def _add_setting(typed: dict[str, Any], text: str) -> None:
    """Add FIELD=VALUE, or router.OPTION=VALUE, which go into a mapping beside the router's name."""
    name, _, value = text.partition("=")
    field, dot, option = name.partition(".")
    known = MoEConfig.__dataclass_fields__
    if not value:
        raise ConfigError(f"--set {text}: expected FIELD=VALUE, for example z_loss=1e-3")
    if field not in known or (dot and field not in {"method", "router"}):
        raise ConfigError(f"--set {text}: there is no field {name}; there are {', '.join(known)}")
    into, key = typed, field
    if dot:
        given = typed.get(field, {})
        into = typed[field] = {"name": given} if isinstance(given, str) else given
        key = option
    if key in into:
        raise ConfigError(f"{name} is given twice: once is enough")
    into[key] = value_of(value)


def value_of(text: str) -> object:
    """Read a truth value, None, or a number; anything else is a word."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
