"""What `moeify.json`, beside a converted model, promises of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeify.checkpoint.tensor_info import ITEMSIZE, torch_dtype
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import PLAN_FILE
from moeify.errors import CheckpointError, ConfigError, first_line
from moeify.files.json_text import read_json_object
from moeify.files.limits import PLAN_BYTES
from moeify.files.reading import exists
from moeify.plan import VERSION, Plan


@dataclass(frozen=True)
class Promise:
    """What a proof holds a converted model to.

    Attributes:
        exact: Whether it must compute what the dense model does.
        cast_to: safetensors name of the dtype that the output was told to store, if any.
        plan: What was converted, and how.
    """

    exact: bool = True  # others' MoEs are held to equality
    cast_to: str | None = None
    plan: Plan | None = None


def read_promise(moe: Path) -> Promise:
    """Read the record of a conversion; without one, nothing was cast and the MoE must be exact.

    Raises:
        CheckpointError: The record is damaged, or of another version.
    """
    file = moe / PLAN_FILE
    if not exists(file):
        return Promise()
    record = read_json_object(file, PLAN_BYTES)
    try:
        if record.get("moeify") != VERSION:
            raise ConfigError(f"it has version {record.get('moeify')!r}, this moeify reads version {VERSION}")
        cast_to = record.get("cast_to")
        if cast_to is not None and not (cast_to in ITEMSIZE and torch_dtype(cast_to).is_floating_point):
            raise ConfigError(f"cast_to is {cast_to!r}, expected null or a dtype such as BF16")
        plan = Plan.from_dict(record) if "sites" in record else None
        return Promise(MoEConfig.from_dict(record.get("config", {})).exact, cast_to, plan)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{file} cannot be used ({first_line(error)}): convert again, or remove it to hold the MoE to equality"
        ) from error
