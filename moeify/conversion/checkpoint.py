"""The streamed applier: a dense checkpoint in, an MoE checkpoint out, in the memory of a few tensors.

The model is traced without weights, so the plan costs nothing that grows with the weights; then every output tensor is
described as a sequence of byte ranges of the source (or, where bytes will not do, as a small computation), and the
checkpoint writer copies them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeify.checkpoint.source import Source
from moeify.checkpoint.staging import staged
from moeify.checkpoint.tensor_info import torch_dtype
from moeify.checkpoint.writer import write_checkpoint
from moeify.config import MoEConfig
from moeify.conversion.output_tensors import output_tensors
from moeify.conversion.refusals import check_plain
from moeify.conversion.rehearsal import rehearse
from moeify.errors import ConfigError
from moeify.families.native import native_config
from moeify.families.table import FAMILIES, MOEIFY, choose_target
from moeify.plan import Plan
from moeify.planning.make_plan import make_plan, survey
from moeify.tracing.skeleton import build_on_meta, full_config, stored_names
from moeify.tracing.trace import Inputs, trace

PLAN_FILE = "moeify.json"


@dataclass(frozen=True)
class Watch:
    """What the caller wants to hear about while a checkpoint is written; each is called with one value.

    Attributes:
        total: Bytes that will be written.
        written: Bytes written since the last call.
        nonfinite: Name of a source tensor that holds NaN or Inf; may raise to stop.
        unused: Name of a source tensor that the model has no place for, which is left out.
    """

    total: Callable[[int], None]
    written: Callable[[int], None]
    nonfinite: Callable[[str], None]
    unused: Callable[[str], None]


def plan_checkpoint(
    source: Source,
    config: MoEConfig,
    layers: str = "all",
    target: str = "auto",
    *,
    example_inputs: Inputs | None = None,
) -> Plan:
    """Plan the conversion of a checkpoint; no weight is read.

    Args:
        source: The opened dense checkpoint.
        config: The settings.
        layers: Which FFNs (see `moeify.planning.selection`).
        target: "auto", "moeify" or a native family.
        example_inputs: Inputs that the forward accepts; None guesses them.

    Raises:
        MoeifyError: nothing to convert, the target would not be exact, or the converted model would not run.
    """
    model = build_on_meta(source.config)
    check_plain(model)
    found = survey(trace(model, example_inputs))
    plan = make_plan(model, found, config, layers)
    plan = plan.with_target(choose_target(plan, full_config(source.config), target))
    if plan.target == MOEIFY:  # a native target is a model that transformers knows
        rehearse(model, plan, found, example_inputs)
    return plan


def check_plan(source: Source, plan: Plan, *, example_inputs: Inputs | None = None) -> None:
    """Hold a plan that was saved to the checkpoint that it is to be used on.

    Raises:
        ConfigError: it was made for another model.
        RefusedError: its target would not be exact for this one.
    """
    if plan.model_type != source.model_type:
        raise ConfigError(f"the plan is for {plan.model_type}, the checkpoint is {source.model_type}")
    fresh = plan_checkpoint(source, plan.config, target=MOEIFY, example_inputs=example_inputs)
    known = {site.path: site for site in fresh.sites}
    for site in plan.sites:
        if known.get(site.path) != site:
            what = "has another FFN there" if site.path in known else "has no FFN there"
            raise ConfigError(f"the plan converts {site.path}, and this model {what}: make a plan for this checkpoint")
    choose_target(plan, full_config(source.config), plan.target)


def convert_checkpoint(
    source: Source,
    dst: Path,
    plan: Plan,
    *,
    watch: Watch,
    check: Callable[[Path], dict[str, Any] | None],
    shard_size: int,
    dtype: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> None:
    """Write the converted checkpoint; `dst` appears whole or not at all.

    Args:
        source: The opened dense checkpoint.
        dst: The output folder.
        plan: What `plan_checkpoint` returned, or a plan that was saved.
        watch: Who hears of progress.
        check: Called with the finished folder before it takes its name; what it returns is kept in `moeify.json`, what
            it raises stops the conversion and leaves nothing.
        shard_size: Bytes per file.
        dtype: safetensors name of the dtype to store floating-point tensors in; None keeps the source's.
        overwrite: Replace `dst` if it is a model folder.
        resume: Go on where an interrupted run stopped.

    Raises:
        CheckpointError: the source lacks a tensor, or the output cannot be written.
    """
    tensors = list(output_tensors(source, plan, dtype, watch.unused))
    nbytes = sum(tensor.nbytes for tensor in tensors)
    watch.total(nbytes)
    with staged(dst, overwrite=overwrite, resume=resume, source=source.path, nbytes=nbytes) as folder:
        write_checkpoint(
            source,
            tensors,
            folder,
            shard_size=shard_size,
            resume=resume,
            on_bytes=watch.written,
            on_nonfinite=watch.nonfinite,
            plan_key=plan.to_json() + str(dtype),
        )
        source.write_side_files(folder)
        stored = dtype or _stored_dtype(source, plan)
        _write_json(folder / "config.json", output_config(source, plan, stored))
        proof = check(folder)
        _write_json(folder / PLAN_FILE, {**plan.to_dict(), "cast_to": dtype, "verification": proof})


def output_config(source: Source, plan: Plan, dtype: str) -> dict[str, Any]:
    """Return the `config.json` of the output."""
    torch_name = str(torch_dtype(dtype)).removeprefix("torch.")
    if plan.target != MOEIFY:
        return native_config(FAMILIES[plan.target], plan, full_config(source.config), torch_name)
    return {**source.config, "dtype": torch_name, **plan.config_entries}


def _stored_dtype(source: Source, plan: Plan) -> str:
    """The dtype of the first converted weight."""
    names = stored_names(build_on_meta(source.config), source.tensors)
    return source.tensors[names.of[plan.sites[0].down.parameter]].dtype


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
