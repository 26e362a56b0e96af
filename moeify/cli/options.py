"""Options that several commands share."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

if TYPE_CHECKING:
    from moeify.checkpoint.source import Accepted

Result = TypeVar("Result")
COMMAND = "moeify.command"  # where click's context keeps what was typed
_SILENT = "moeify.silent"  # and that notes and progress are not wanted
_OF_A_RUN = {"--resume": False, "--join": False, "--workers": True, "--part": True,  # and whether a value follows
             "--quiet": False, "-q": False}  # fmt: skip


def command_line() -> str:
    """Return the command that is running, as a shell reads it, without the options that make no other output."""
    kept: list[str] = []
    typed = iter(click.get_current_context().meta[COMMAND])
    for word in typed:
        name, _, value = word.partition("=")
        if name not in _OF_A_RUN:
            kept.append(word)
        elif _OF_A_RUN[name] and not value:
            next(typed, None)
    return shlex.join(["moeify", *kept])


def source_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """Add the options of every command that opens checkpoints; the command gets them as `accepted`."""

    @click.option("--allow-pickle", is_flag=True, help="Accept pytorch_model.bin, read with weights_only.")
    @click.option("--trust-remote-code", is_flag=True, help="Accept a model whose config names Python code of its own.")
    @click.option("--dequantize", is_flag=True, help="Accept quantized weights, and undo that on the way.")
    @wraps(command)
    def with_accepted(
        *args: object, allow_pickle: bool, trust_remote_code: bool, dequantize: bool, **given: object
    ) -> Result:
        accepted: Accepted = {
            "allow_pickle": allow_pickle,
            "trust_remote_code": trust_remote_code,
            "dequantize": dequantize,
        }
        return command(*args, accepted=accepted, **given)

    return with_accepted


def _silence(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_SILENT] = True
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # of downloads: huggingface_hub reads it when it is imported


def silent() -> bool:
    """Return whether the command that is running was asked for no notes and no progress."""
    ctx = click.get_current_context(silent=True)
    return ctx is not None and _SILENT in ctx.meta


# Every command has it, and so has the group: people type it before and after the command.
quiet_option = click.option(
    "-q", "--quiet", is_flag=True, expose_value=False, callback=_silence,
    help="Print no notes and no progress on stderr: warnings and errors only.",
)  # fmt: skip

example_inputs_option = click.option(
    "--example-inputs",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Arguments of the model's forward by name (.json, .safetensors), where they cannot be guessed.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, nothing else on stdout.")

LAYERS = "all, every:N, last:N, first:N, 0,3-7, or a regex on the paths that moeify inspect shows"

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32"}
_LARGEST = 10**15  # bytes of a file: a larger number is a slip
_UNITS = {"": 1, "B": 1, **{f"{prefix}{unit}": base**power for unit, base in (("B", 1000), ("IB", 1024))
                            for power, prefix in enumerate("KMGT", start=1)}}  # fmt: skip


class Dtype(click.Choice[str]):
    """A dtype by torch's name for it, or the short name that people use."""

    def __init__(self, names: Iterable[str]) -> None:
        names = tuple(names)
        super().__init__([*names, *(short for short, name in _SHORT.items() if name in names)])

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return torch's name."""
        found = super().convert(value, param, ctx)
        return _SHORT.get(found, found)


class Size(click.ParamType[int]):
    """A number of bytes such as 5GB or 500MB."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse the text."""
        found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]?I?B)?", str(value).upper(), re.ASCII)
        size = int(float(found[1]) * _UNITS.get(found[2] or "", 0)) if found else 0
        if not 1 <= size <= _LARGEST:
            self.fail(f"{value!r} is not a size: write 5GB, 500MB, 10GiB or a number of bytes", param, ctx)
        return size


class PartOf(click.ParamType[tuple[int, int]]):
    """A part of several such as 2/4."""

    name = "part"

    def convert(
        self, value: str | tuple[int, int], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Parse the text."""
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", value, re.ASCII)
        number, count = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= number <= count:
            self.fail(f"{value!r} is no part: write 1/4, 2/4, 3/4 and 4/4 for the four parts of one output", param, ctx)
        return number, count
