"""What is known of an MoE before it runs: how it was made, what it costs, and what it was held to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from moeify.checkpoint.source import Source
from moeify.contract.found import FoundLayer
from moeify.conversion.checkpoint import PLAN_FILE
from moeify.conversion.cost import model_cost
from moeify.errors import CheckpointError, ConfigError
from moeify.families.base import Config
from moeify.families.table import FAMILIES, remarks
from moeify.files.json_text import read_json_object
from moeify.files.limits import PLAN_BYTES
from moeify.measure import TOLERANCE
from moeify.names import folded
from moeify.parallel.costs import Setup
from moeify.parallel.estimate import estimate
from moeify.parallel.sizes import found_layers
from moeify.plan import Plan, stored_plan
from moeify.proving.record import read_promise
from moeify.report.data import Conversion, Costs, LayerProof, Proof, Ranks, Size

_OURS = ("transformers with moeify", "vLLM with moeify")
_ALWAYS = {"experts", "top_k", "method", "router"}  # settings that are shown also where they are the defaults
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}
_RANKS = (2, 4, 8, 16, 32, 64)
_TOKENS, _BANDWIDTH, _FLOPS = 8192, 50e9, 400e12  # as `moeify inspect --ep` assumes


def short(number: float) -> float:
    """Return a number as it is shown: four digits."""
    return float(f"{number:.4g}")


def engines_of(source: Source, plan: Plan | None) -> tuple[str, ...]:
    """Return what runs a checkpoint, as far as moeify knows its format."""
    if plan is not None and plan.target not in FAMILIES:
        return _OURS
    family = FAMILIES.get(source.model_type)
    return ("transformers",) if family is None else tuple(family.engines)


def plan_of(source: Source) -> tuple[Plan | None, str | None]:
    """Return the plan by which a model was made, and the dtype that it was told to store; None where nothing says it.

    Raises:
        CheckpointError: The record beside the model, or the plan in its config, is damaged.
    """
    promise = read_promise(_folder(source))
    stored = stored_plan(source.config)
    if promise.plan is not None or stored is None:
        return promise.plan, promise.cast_to
    try:
        return Plan.from_dict(stored), None
    except ConfigError as error:
        raise CheckpointError(f"{source.path}: its config cannot be used ({error})") from error


def conversion_of(plan: Plan, config: Config, cast_to: str | None) -> Conversion:
    """Describe a plan.

    Args:
        plan: By which the model was made.
        config: Of the model.
        cast_to: The dtype that the plan was told to store.
    """
    settings = plan.config
    defaults = {field.name: field.default for field in fields(settings)}
    defaults |= {name: getattr(settings.router, name) for name in ("renormalize", "aux_loss")}
    shown = {name: value for name, value in settings.to_dict().items() if value != defaults[name] or name in _ALWAYS}
    return Conversion(
        source=plan.model_type,
        target=plan.target,
        ffns=len(plan.sites),
        where=folded(site.path or "the model itself" for site in plan.sites),
        settings={name: _setting(value) for name, value in shown.items()},
        dtype=cast_to,
        remarks=tuple(remarks(plan, config)),
    )


def _setting(value: object) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    options = ", ".join(f"{name}={option}" for name, option in value.items() if name != "name")
    return f"{value['name']} ({options})" if options else str(value["name"])


def size_of(source: Source, model: nn.Module, layers: Mapping[str, FoundLayer]) -> Size:
    """Count a checkpoint."""
    return Size(*model_cost(model, layers, source.nbytes))


def costs_of(layers: Mapping[str, FoundLayer], moe: Size, dense: Size | None) -> Costs:
    """Count what a model costs in memory, and among ranks that share its experts."""
    memory = {dtype: round(moe.parameters * width) for dtype, width in _BYTES.items()}
    each = max(1, round(moe.bytes / max(moe.parameters, 1)))
    assumed = (
        f"One step of training on one rank with {_TOKENS:,} tokens, values of {each} bytes, {_BANDWIDTH / 1e9:g} GB/s "
        f"between ranks and {_FLOPS / 1e12:g} TFLOP/s."
    )
    parallel = tuple(_parallel(layers, moe, each))
    return Costs(moe, dense, memory, assumed if parallel else "", parallel)


def _parallel(layers: Mapping[str, FoundLayer], moe: Size, each: int) -> Iterator[Ranks]:
    for ranks in _RANKS:
        try:
            setup = Setup(found_layers(layers), moe.parameters, each, ranks, 1, _TOKENS, _BANDWIDTH, _FLOPS)
            counted = estimate(setup)
        except ConfigError:  # so many ranks cannot share them evenly, or nothing says how many choices there are
            continue
        shared = counted.engines[0]
        yield Ranks(ranks, shared.exchanged, shared.weights, short(shared.waits), counted.advice[0])


def recorded_proof(source: Source) -> Proof | None:
    """Return the proof that was made when the model was written; None if there was none.

    Raises:
        CheckpointError: The record is damaged.
    """
    file = _folder(source) / PLAN_FILE
    record = read_json_object(file, PLAN_BYTES).get("verification") if file.is_file() else None
    try:
        return None if record is None else proof_of("when it was converted", record)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: its verification cannot be used; convert again, or remove the file") from error


def proof_of(when: str, record: Any) -> Proof:
    """Return a proof of the data that `VerifyReport.to_dict` gives."""
    layers = [LayerProof(str(each["name"]), float(each["relative"]), str(each["dtype"]), TOLERANCE[each["dtype"]])
              for each in record["layers"]]  # fmt: skip
    tolerance = record["tolerance"]
    return Proof(
        when=when,
        passed=bool(record["passed"]),
        relative=float(record["relative"]),
        tolerance=None if tolerance is None else float(tolerance),
        top1_agreement=float(record["top1_agreement"]),
        altered=len(record["altered"]),
        layers=tuple(layers),
    )


def _folder(source: Source) -> Path:
    return source.path if source.path.is_dir() else source.path.parent
