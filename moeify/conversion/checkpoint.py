"""The applier for checkpoints: a dense checkpoint in, an MoE checkpoint out, in the memory of a few tensors.

The model is traced without weights, so the plan costs nothing that grows with the weights; then every output tensor is
described as a sequence of byte ranges of the source (or, where bytes will not do, as a small computation), and the
checkpoint writer copies them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeify.checkpoint.folder import CARD
from moeify.checkpoint.tensor_info import torch_dtype
from moeify.checkpoint.writer import Files, plan_files, write_index, write_shards
from moeify.config import MoEConfig
from moeify.contract.model import describe
from moeify.conversion.card import model_card
from moeify.conversion.cost import least_bytes
from moeify.conversion.dense import DenseCheckpoint
from moeify.conversion.output_tensors import output_tensors
from moeify.conversion.refusals import check_convertible
from moeify.conversion.rehearsal import rehearse
from moeify.errors import ConfigError, RefusedError
from moeify.families.gguf import gguf_of, why_not_gguf
from moeify.families.native import native_config
from moeify.families.table import FAMILIES, fit_target
from moeify.families.words import MOEIFY
from moeify.files.staging import check_space, staged_folder
from moeify.plan import Plan
from moeify.planning.make_plan import make_plan, plan_sites

PLAN_FILE = "moeify.json"


@dataclass(frozen=True)
class Output:
    """What is written, and where.

    Attributes:
        folder: The output folder; it appears whole or not at all.
        shard_size: Bytes per file.
        dtype: The safetensors name of the dtype to store floating-point tensors in; None keeps the source's.
        overwrite: Replace `folder` if it is a model folder.
        resume: Go on where an interrupted run stopped.
        workers: Processes that write; the files are the same for any number.
        command: The command that asked for it, for the model card.
    """

    folder: Path
    shard_size: int
    dtype: str | None = None
    overwrite: bool = False
    resume: bool = False
    workers: int = 1
    command: str | None = None


def _ignore(_: object) -> None: ...


@dataclass(frozen=True)
class Callbacks:
    """What is called while a checkpoint is written.

    Attributes:
        total: Bytes that will be written; called once, first.
        written: Bytes written since the last call; fewer than none where a killed worker's shard is written again.
        nonfinite: Name of a source tensor that holds NaN or Inf; may raise to stop.
        unused: Names of the source's tensors that the model has no place for, which are left out; called once.
        check: The finished folder, before it takes its name; what this returns is kept in `moeify.json`, what it
            raises stops the conversion and leaves nothing.
    """

    total: Callable[[int], None] = _ignore
    written: Callable[[int], None] = _ignore
    nonfinite: Callable[[str], None] = _ignore
    unused: Callable[[Sequence[str]], None] = _ignore
    check: Callable[[Path], object] = _ignore


def plan_checkpoint(
    dense: DenseCheckpoint, config: MoEConfig, layers: str = "all", target: str = "auto", *, gguf: bool = False
) -> Plan:
    """Plan the conversion of a checkpoint; no weight is read.

    Args:
        dense: The dense checkpoint.
        config: The settings.
        layers: Which FFNs (see `moeify.planning.selection`).
        target: "auto", "moeify" or a native family.
        gguf: The output is a GGUF file, which llama.cpp must run as it is meant.

    Raises:
        MoeifyError: Nothing to convert, the target would not be exact, or the converted model would not run.
    """
    check_convertible(dense.model)
    plan = make_plan(dense.model, dense.graph_module, dense.inspection, config, layers)
    return _with_checked_target(dense, plan, target, gguf=gguf)


def check_plan(dense: DenseCheckpoint, plan: Plan, *, gguf: bool = False) -> None:
    """Hold a plan that was saved to the checkpoint that it is to be used on.

    Args:
        dense: The dense checkpoint.
        plan: The plan.
        gguf: The output is a GGUF file.

    Raises:
        ConfigError: It was made for another model.
        MoeifyError: The target would not be exact, or the converted model would not run.
    """
    if plan.model_type != dense.source.model_type:
        raise ConfigError(f"the plan is for {plan.model_type}, the checkpoint is {dense.source.model_type}")
    if not plan.sites:
        raise ConfigError("the plan converts nothing: make it again with --dry-run --json")
    twice = [path for path, count in Counter(site.path for site in plan.sites).items() if count > 1]
    if twice:
        raise ConfigError(f"the plan converts {twice[0]} twice: make it again with --dry-run --json")
    check_convertible(dense.model)
    wanted = {site.down.parameter for site in plan.sites}
    ffns = [ffn for ffn in dense.inspection.ffns if ffn.down.weight in wanted]
    known = {site.path: site for site in plan_sites(dense.model, dense.graph_module, ffns, plan.config)}
    for site in plan.sites:
        if known.get(site.path) != site:
            what = "has another FFN there" if site.path in known else "has no FFN there"
            raise ConfigError(f"the plan converts {site.path}, and this model {what}: make a plan for this checkpoint")
    _with_checked_target(dense, plan, plan.target, gguf=gguf)


def _with_checked_target(dense: DenseCheckpoint, plan: Plan, target: str, *, gguf: bool) -> Plan:
    """Return the plan for a format in which the converted model is exact and runs."""

    def suits(fitted: Plan) -> bool:
        if not gguf:
            return True
        config = output_config(dense, fitted, None)
        return why_not_gguf(fitted, config) is None and not gguf_of(fitted, config).differs

    plan = fit_target(plan, dense.config, target, suits)
    if gguf and target == "auto" and plan.target == MOEIFY:
        what = "no family that is written as GGUF is exact"
        raise RefusedError(f"{what} for this {plan.model_type}: `moeify families` says why; or write a folder")
    if gguf and (reason := why_not_gguf(plan, output_config(dense, plan, None))):
        raise RefusedError(reason)
    if plan.target == MOEIFY:  # a native target is a model that transformers knows
        rehearse(dense, plan)
    return plan


def convert_checkpoint(dense: DenseCheckpoint, plan: Plan, output: Output, callbacks: Callbacks = Callbacks()) -> None:
    """Write the converted checkpoint.

    Args:
        dense: The dense checkpoint.
        plan: What `plan_checkpoint` returned, or a saved plan that `check_plan` accepted.
        output: What is written, and where.
        callbacks: What is called meanwhile.

    Raises:
        CheckpointError: The source lacks a tensor or changes meanwhile, or the output cannot be written.
    """
    check_space(output.folder, least_bytes(dense, plan, output.dtype))  # at once: listing tensors can take minutes
    files = planned_files(dense, plan, output, callbacks)
    callbacks.total(files.nbytes)
    options = {"overwrite": output.overwrite, "resume": output.resume}
    with staged_folder(output.folder, sources=files.source.folders, nbytes=files.nbytes, **options) as folder:
        write_planned(files, folder, output, callbacks, resume=output.resume)
        complete(dense, plan, output, callbacks, files, folder)


def planned_files(dense: DenseCheckpoint, plan: Plan, output: Output, callbacks: Callbacks) -> Files:
    """List the files of the output.

    Raises:
        CheckpointError: The source lacks a tensor.
    """
    tensors = list(output_tensors(dense, plan, output.dtype, callbacks.unused))
    return plan_files(dense.source, tensors, output.shard_size, plan.to_json() + str(output.dtype))


def write_planned(files: Files, folder: Path, output: Output, callbacks: Callbacks, *, resume: bool) -> None:
    """Write files, all or some, into a staged folder."""
    write_shards(
        files,
        folder,
        resume=resume,
        on_bytes=callbacks.written,
        on_nonfinite=callbacks.nonfinite,
        workers=output.workers,
    )


def complete(
    dense: DenseCheckpoint, plan: Plan, output: Output, callbacks: Callbacks, files: Files, folder: Path
) -> None:
    """Make a model of a staged folder that has all files: index, config, proof, plan and card.

    Raises:
        CheckpointError: The source has changed meanwhile.
    """
    if len(files.shards) > 1:
        write_index(folder, files.shards)
    _write_json(folder / "config.json", output_config(dense, plan, output.dtype))
    proof = callbacks.check(folder)
    _write_json(folder / PLAN_FILE, {**plan.to_dict(), "cast_to": output.dtype, "verification": proof})
    (folder / CARD).write_text(model_card(dense, plan, output.folder.name, proof, output.command), "utf-8")
    files.source.check_unchanged()


def output_config(dense: DenseCheckpoint, plan: Plan, dtype: str | None) -> dict[str, Any]:
    """Return the `config.json` of the output; without a dtype, with that of the first converted weight."""
    torch_name = str(torch_dtype(dtype or dense.info(plan.sites[0].down.parameter).dtype)).removeprefix("torch.")
    if plan.target != MOEIFY:
        return native_config(FAMILIES[plan.target], plan, dense.config, torch_name)
    fields = {name: value for name, value in dense.source.config.items() if name != "auto_map"}  # it knows no experts
    return describe({**fields, "dtype": torch_name}, dense.model.config, plan)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
