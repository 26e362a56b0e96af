"""The plan of a conversion, as data: per FFN where it is, what its weights are called, and what replaces it.

A plan is made from a traced graph, printed, saved beside the output as `moeify.json`, and read back with `--plan`.
The three appliers (in place, on a graph, from checkpoint to checkpoint) do what it says and decide nothing themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moeify.config import MoEConfig
from moeify.config.checks import check_fields
from moeify.errors import CheckpointError, ConfigError
from moeify.files.json_text import parse_json
from moeify.files.limits import PLAN_BYTES
from moeify.files.reading import read_bytes

VERSION = 2
FIELD, LINEAR = "moeify", "linear"  # the field of a config.json, and in it: experts are linears
OLDER_FORMAT = (
    "it has its plan where an older moeify wrote it: rename the field quantization_config of its config.json to moeify"
)
# The name of an implementation of experts that a transformers without moeify does not know, and repeats in its error.
ASK_FOR_MOEIFY = "moeify (pip install moeify, then: import moeify; moeify.register())"


@dataclass(frozen=True)
class Rows:
    """Output rows of a projection: `parameter[start:stop:step]`, and the same rows of its bias.

    Attributes:
        parameter: Name of the weight.
        bias: Name of the bias, or None.
        start: First output row.
        stop: End of the rows.
        step: 2 where gate and up rows alternate, else 1.
        out_features: How many output rows the parameter has in all.
        transposed: The weight is stored (in, out), as in GPT-2, and not (out, in).
    """

    parameter: str
    bias: str | None
    start: int
    stop: int
    step: int
    out_features: int
    transposed: bool

    @property
    def count(self) -> int:
        """Number of rows."""
        return (self.stop - self.start + self.step - 1) // self.step

    def shard(self, index: int, shards: int) -> Rows:
        """Return one of `shards` equal runs of these rows."""
        start = self.start + index * (self.count // shards) * self.step
        return replace(self, start=start, stop=start + (self.count // shards) * self.step)


@dataclass(frozen=True)
class Site:
    """One FFN and its place in the model.

    Attributes:
        path: Where the MoE layer sits.
        bypassed: Modules that pass their input on from now, because the layer at `path` does their work.
        kind: "glu" or "mlp".
        activation: Canonical name, or "custom" (then the captured graph is the activation).
        hidden: Hidden size of the model here.
        intermediate: Intermediate size of the FFN; an expert's is this divided by the granularity.
        ups: Rows of the up projections: gate, then up; a single one without a gate; for a custom activation every
            projection whole, in the order in which the region takes them.
        down: The down projection.
        dropout: Probability with which the dense FFN dropped its output.
        expert_dropout: Probability with which it dropped its hidden layer.
        activation_state: Names of the parameters and buffers that a custom activation reads, and what the layer calls
            them.
        handing: Those of `bypassed` that hand their input to the layer, and pass zeros on.
        axis: The dimension of the features at `path`, counted from the end: -3 for 1x1 convolutions over images.
        rounded: The FFN has the name of its activation up to rounding to float32 only.
    """

    path: str
    bypassed: tuple[str, ...]
    kind: str
    activation: str
    hidden: int
    intermediate: int
    ups: tuple[Rows, ...]
    down: Rows
    dropout: float
    expert_dropout: float
    activation_state: tuple[tuple[str, str], ...] = ()
    handing: tuple[str, ...] = ()
    axis: int = -1
    rounded: bool = False

    @property
    def gated(self) -> bool:
        """Whether experts hold gate and up rows in one `gate_up_proj`."""
        return self.kind == "glu" and self.activation != "custom"

    @property
    def up_name(self) -> str:
        """Name of the experts' first weight."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the dense parameters that the experts replace."""
        names = [n for rows in (*self.ups, self.down) for n in (rows.parameter, rows.bias) if n]
        return tuple(dict.fromkeys(names))

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of all dense parameters and buffers whose values the layer takes."""
        return (*self.parameters, *(dense for dense, _ in self.activation_state))

    @property
    def up_bias(self) -> bool:
        """Whether an up projection has a bias."""
        return any(rows.bias for rows in self.ups)


@dataclass(frozen=True)
class Plan:
    """A conversion: the settings, and the sites that it applies to.

    Attributes:
        model_type: The dense model's type, or its class name outside transformers.
        config: The settings.
        sites: The FFNs to convert, in order of execution.
        target: Checkpoint format: a native family's model type, or "moeify".
    """

    model_type: str
    config: MoEConfig
    sites: tuple[Site, ...]
    target: str = "moeify"

    def renamed(self, rename: Callable[[str], str | None]) -> Plan:
        """Return the plan under other names, without the sites that have none.

        Args:
            rename: Takes a module's or parameter's name; returns its name, or None if it is not there.
        """

        def name(old: str) -> str:
            return rename(old) or old

        def rows(of: Rows) -> Rows:
            return replace(of, parameter=name(of.parameter), bias=of.bias and name(of.bias))

        sites = [
            replace(
                site,
                path=name(site.path),
                bypassed=tuple(map(name, site.bypassed)),
                handing=tuple(map(name, site.handing)),
                ups=tuple(map(rows, site.ups)),
                down=rows(site.down),
                activation_state=tuple((name(dense), own) for dense, own in site.activation_state),
            )
            for site in self.sites
            if rename(site.path) is not None
        ]
        return replace(self, sites=tuple(sites))

    @property
    def config_entries(self) -> dict[str, Any]:
        """What a transformers `config.json` says of a converted model.

        A transformers that `moeify.register()` was not called for does not see the plan, and would draw the experts at
        random; the second entry stops it.
        """
        return {FIELD: {"plan": self.to_dict()}, "experts_implementation": ASK_FOR_MOEIFY}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `Plan.from_dict` is the inverse."""
        sites = [asdict(site) for site in self.sites]
        return {"moeify": VERSION, **vars(self), "config": self.config.to_dict(), "sites": sites}

    def to_json(self) -> str:
        """Return the plan as JSON text; `Plan.from_json` is the inverse."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @staticmethod
    def from_dict(data: object) -> Plan:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: Another version, or fields that are missing or unknown.
        """
        if not isinstance(data, dict):
            raise ConfigError("the plan is not a JSON object: expected what moeify wrote as moeify.json")
        if (version := data.get("moeify")) != VERSION:
            newer = isinstance(version, int) and version > VERSION
            advice = "update moeify (pip install -U moeify)" if newer else "make it again with this moeify"
            raise ConfigError(f"the plan has version {str(version)[:20]}, and this moeify reads {VERSION}: {advice}")
        try:
            plan = Plan(
                model_type=data["model_type"],
                config=MoEConfig.from_dict(data["config"]),
                sites=tuple(_site(site) for site in data["sites"]),
                target=data["target"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the plan is damaged ({error}): make it again with --dry-run --json") from error
        plan._check_types()
        return plan

    def _check_types(self) -> None:
        check_fields(self, "the plan is damaged: its ", besides={"config", "sites"})
        for site in self.sites:
            check_fields(site, "the plan is damaged: a site's ", besides={"ups", "down"})
            for rows in (*site.ups, site.down):
                check_fields(rows, f"the plan is damaged: in {site.path}, ")

    @staticmethod
    def from_file(path: Path) -> Plan:
        """Read the file of a plan.

        Raises:
            ConfigError: It cannot be read, or is not a plan.
        """
        try:
            return Plan.from_json(read_bytes(path, PLAN_BYTES))
        except CheckpointError as error:
            raise ConfigError(f"--plan: {error}") from error

    @staticmethod
    def from_json(text: str | bytes) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: Not JSON, or not a plan.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise ConfigError(f"the plan is not JSON: {error}") from error
        return Plan.from_dict(data)


def stored_plan(config: Mapping[str, Any]) -> object:
    """Return the plan that the fields of a config hold, unchecked; None if it describes no converted model."""
    entry = config.get(FIELD)
    return entry.get("plan", entry) if isinstance(entry, dict) else entry


def _site(data: Mapping[str, Any]) -> Site:
    ups = tuple(Rows(**rows) for rows in data["ups"])
    state = tuple((dense, own) for dense, own in data["activation_state"])
    paths = {name: tuple(data[name]) for name in ("bypassed", "handing") if name in data}
    return Site(**{**data, **paths, "ups": ups, "down": Rows(**data["down"]), "activation_state": state})
