"""The options that make a `MoEConfig`, shared by commands that convert."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moeify.errors import ConfigError

if TYPE_CHECKING:
    from moeify.config import MoEConfig

F = TypeVar("F", bound=Callable[..., Any])

PRESETS = ("switch", "gshard", "st_moe", "noisy_topk", "mixtral", "deepseek_v3", "expert_choice", "dropless")
_WORDS = {"true": True, "false": False, "none": None}


def config_options(command: F) -> F:
    """Add the options that `config_from` takes."""
    for option in reversed(
        (
            click.option("--experts", type=int, help="Experts in each converted layer."),
            click.option("--top-k", type=int, help="Experts that each token visits."),
            click.option("--method", help="How experts are made: copy, noise or drop.  [default: copy]"),
            click.option("--granularity", type=int, help="Cut each FFN into this many experts.  [default: 1]"),
            click.option("--shared-experts", type=int, help="Experts that every token visits besides.  [default: 0]"),
            click.option("--preset", type=click.Choice(PRESETS), help="Start from the settings of a paper."),
            click.option("--router", help="Who chooses experts: softmax, gshard, sigmoid, …  [default: softmax]"),
            click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE",
                         help="Any other field of MoEConfig, such as z_loss=1e-3; may be repeated."),
            click.option("--seed", type=int, help="Start of all random numbers.  [default: 0]"),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def config_from(options: dict[str, Any]) -> MoEConfig:
    """Make the settings from what was typed; what was not typed is the preset's, or the default.

    Raises:
        ConfigError: a value that is wrong, or a field that there is not.
        UsageError: a preset was not given, and the numbers of experts neither.
    """
    from moeify.config import MoEConfig

    apart = {"preset", "settings"}
    typed = {name: value for name, value in options.items() if name not in apart and value is not None}
    for text in options["settings"]:
        name, value = _setting(text)
        if name in typed:
            raise ConfigError(f"{name} is given twice: once is enough")
        typed[name] = value
    preset = options["preset"]
    if "experts" not in typed or ("top_k" not in typed and preset is None):
        raise click.UsageError("--experts and --top-k are needed: for example --experts 8 --top-k 2")
    return MoEConfig(**typed) if preset is None else getattr(MoEConfig, preset)(**typed)


def _setting(text: str) -> tuple[str, Any]:
    """Read FIELD=VALUE; the value in the type of the field's default."""
    from moeify.config import MoEConfig

    name, equals, value = text.partition("=")
    known = MoEConfig.__dataclass_fields__
    if not equals or not value:
        raise ConfigError(f"--set {text}: expected FIELD=VALUE, for example z_loss=1e-3")
    if name not in known:
        raise ConfigError(f"--set {text}: there is no field {name}; there are {', '.join(known)}")
    kind = str(known[name].type)
    if value.lower() in _WORDS and ("bool" in kind or "None" in kind):
        return name, _WORDS[value.lower()]
    if "bool" in kind:
        raise ConfigError(f"--set {text}: {name} is true or false")
    try:
        return name, float(value) if "float" in kind else int(value) if "int" in kind else value
    except ValueError as error:
        raise ConfigError(f"--set {text}: {name} takes a number") from error
