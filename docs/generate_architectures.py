"""Write docs/architectures.md: every model type that transformers registers, traced, searched and counted.

    python docs/generate_architectures.py              the whole table (`make docs`)
    python docs/generate_architectures.py llama t5     some model types, on stdout
    python docs/generate_architectures.py --rows DIR   what DIR lacks of it, then the whole table from DIR

Each type is built from its default configuration with two layers a stack, on the meta device. What the matcher finds by
dataflow is compared with a count by the names and shapes of the parameters, which knows nothing of graphs. Where the
default configuration is no valid model, and where names say too much or too little, docs/architectures.json has what
was looked up by hand.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures.count_by_name import Sizes, by_name
from torch import nn
from transformers.models.auto import modeling_auto as auto

from moeify.errors import MoeifyError
from moeify.passes.ffn import FFN, Inspection
from moeify.passes.find_ffn import find_ffns_in
from moeify.planning.placement import Placer
from moeify.tracing.trace import UNTRACED, trace

HERE = Path(__file__).resolve().parent
LAYERS = 2

TASKS: dict[str, tuple[Any, Any]] = {
    "causal LM": (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
    "seq2seq": (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForSeq2SeqLM),
    "speech": (auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, transformers.AutoModelForSpeechSeq2Seq),
    "masked LM": (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM),
    "base": (auto.MODEL_MAPPING_NAMES, transformers.AutoModel),
}
DEPTHS = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|(num_)?(encoder|decoder)_layers|num_(encoder|decoder)_(layers|blocks)"
    r"|num_block_layers|depth|num_hidden_blocks|[lrx]_layers|.*_num_hidden_layers|resampler_depth|vision_depth"
)
PER_LAYER = re.compile(r"(mlp_|attn_)?layer_types|layers_block_type")
STAGES = re.compile(r"depths|num_blocks|layers_per_stage|encoder_depths|stage_depths|blocks_per_stage")


@dataclass(frozen=True)
class Row:
    """What came of one model type."""

    model_type: str
    task: str
    found: Sizes = field(default_factory=dict)
    expected: Sizes = field(default_factory=dict)
    forms: tuple[str, ...] = ()
    shared_experts: int = 0
    refused: tuple[str, ...] = ()
    parts: int = 0
    applier: str = ""
    note: str = ""
    problem: str = ""

    @property
    def right(self) -> bool:
        """Whether exactly the expected FFNs were found, with the right widths."""
        return not self.problem and self.found == self.expected


def model_types() -> dict[str, str]:
    """Return every registered model type with the first task that it is registered for."""
    return {name: task for task, (names, _) in reversed(TASKS.items()) for name in sorted(names)}


def looked_up(model_type: str) -> dict[str, Any]:
    """Return what docs/architectures.json says about a model type."""
    entries: dict[str, dict[str, Any]] = json.loads((HERE / "architectures.json").read_text())
    return entries.get(model_type, {})


def examine(model_type: str) -> Row:
    """Build a model, search it by dataflow and by names."""
    logging.disable()
    warnings.simplefilter("ignore")
    task, facts = model_types()[model_type], looked_up(model_type)
    row = Row(model_type, task, note=facts.get("note", ""))
    try:
        model = build(model_type, task, facts.get("config", {}))
    except Exception as error:  # whatever stops a model from being built is the row's content
        return Row(model_type, task, problem="not built: " + _line(error), note=row.note)
    inputs = {name: _zeros(spec) for name, spec in facts.get("inputs", {}).items()}
    expected = by_name(model, facts.get("also", []), facts.get("not", []))
    try:
        graph_module = trace(model, inputs or None)
    except MoeifyError as error:
        return Row(model_type, task, expected=expected, problem="not traced: " + _line(error), note=row.note)
    found = find_ffns_in(graph_module)
    routed = any(re.search(r"\bexperts\b", name) for name, _ in model.named_parameters())
    only_routed = routed and not found.ffns and not expected
    return Row(
        model_type,
        task,
        found={ffn.down.weight: (ffn.hidden, ffn.intermediate) for ffn in found.ffns},
        expected=expected,
        forms=tuple(dict.fromkeys(f"{ffn.activation} {ffn.kind}" for ffn in found.ffns)),
        shared_experts=sum(ffn.shared_expert for ffn in found.ffns),
        refused=("all its FFNs are routed experts",) if only_routed else _reasons(found),
        parts=len(graph_module.meta[UNTRACED]),
        applier=_applier(found.ffns, Placer(graph_module)),
        note=row.note,
    )


def build(model_type: str, task: str, changes: dict[str, Any]) -> nn.Module:
    """Build a small model on the meta device: default widths, two layers."""
    config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    top = {name: _configuration(value) for name, value in changes.items() if "." not in name}
    config = config_class(**top)
    _cut(config, set())
    for path, value in (changes | top).items():
        *holders, name = path.split(".")
        holder = config
        for inner in holders:
            holder = getattr(holder, inner)
        setattr(holder, name, value)
    names, auto_class = TASKS[task]
    with torch.device("meta"):
        try:
            model: nn.Module = auto_class.from_config(config)
        except (ValueError, AttributeError):
            name = names[model_type]
            model_class = getattr(transformers, name if isinstance(name, str) else name[0])
            if not isinstance(config, model_class.config_class):  # the decoder of a model of several
                config = model_class.config_class()
                _cut(config, set())
            model = model_class(config)
    return model


def _configuration(value: Any) -> Any:
    """Return a configuration for a dictionary that names a model type, and anything else as it is."""
    named = isinstance(value, dict) and "model_type" in value
    return transformers.AutoConfig.for_model(**value) if named else value


def _cut(config: Any, seen: set[int]) -> None:
    """Cut every stack of a configuration and of those inside it to two layers, and every stage to one."""
    seen.add(id(config))
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig) and id(value) not in seen:
            _cut(value, seen)
        elif DEPTHS.fullmatch(name) and type(value) is int and value > LAYERS:
            setattr(config, name, LAYERS)
        elif PER_LAYER.fullmatch(name) and isinstance(value, list):
            setattr(config, name, value[:LAYERS])
        elif STAGES.fullmatch(name) and isinstance(value, list | tuple):
            setattr(config, name, type(value)(1 for _ in value))


def _applier(ffns: tuple[FFN, ...], placer: Placer) -> str:
    graph_only = 0
    for ffn in ffns:
        try:
            placer.place(ffn)
        except MoeifyError:
            graph_only += 1
    if not ffns:
        return ""
    return "in place" if not graph_only else "graph" if graph_only == len(ffns) else "in place; graph for some"


def _reasons(found: Inspection) -> tuple[str, ...]:
    """Return the distinct reasons, numbers and names left out, most frequent first."""
    general = (re.sub(r": [\w.]+ and [\w.]+|`|_\d+|\([^)]*\)", "", r.reason) for r in found.refused)
    counts = Counter(re.sub(r"\s+", " ", re.sub(r"\b[\w.]+\.[\w.]+ projects", "another layer projects", text))
                     for text in general)  # fmt: skip
    return tuple(f"{count}x {reason}" for reason, count in counts.most_common(3))


def _zeros(spec: Any) -> Any:
    """Return a tensor for {"shape": …, "dtype": …}, and anything else as it is."""
    if isinstance(spec, dict) and "shape" in spec:
        return torch.zeros(spec["shape"], dtype=getattr(torch, spec.get("dtype", "float32")), device="meta")
    return spec


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def table(rows: list[Row]) -> str:
    """Return the document."""
    seen = [row for row in rows if not row.problem]
    right = sum(row.right for row in seen)
    corrected = sum(bool({"also", "not"} & looked_up(row.model_type).keys()) for row in rows)
    extra = sum(bool(row.found.keys() - row.expected.keys()) for row in seen)
    lines = [
        "# Architectures",
        "",
        f"Every model type that transformers {transformers.__version__} registers for language, vision and audio,",
        "built with two layers a stack on the meta device, traced, and searched for dense FFNs. This page is written",
        "by `make docs`.",
        "",
        f"{len(rows)} types: {right} with exactly the expected FFNs, {len(seen) - right} not "
        f"({extra} of them with something that is no FFN), {len(rows) - len(seen)} that could not be built or traced.",
        "",
        "The expected FFNs are counted by `docs/architectures/count_by_name.py`, which knows nothing of graphs: a pair",
        "of parameters named as transformers names FFNs (`fc1` and `fc2`, `up_proj` and `down_proj`, …) whose",
        f"shapes lead from a width and back to it. For {corrected} types such names say too much or too little; there,",
        "a person read the model after the two counts disagreed, and docs/architectures.json holds the patterns.",
        "",
        "| why not built or traced | types |",
        "|---|---|",
        *_causes(rows),
        "",
        "`*` some of the FFNs are shared experts of an MoE that the model already has. `†` parts of the model were",
        "traced by themselves. `graph`: the FFN is written into its block, so that only the graph passes replace it.",
        "",
        "| model type | task | found / expected | form | applier | refused, and notes |",
        "|---|---|--:|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(row) for row in rows)]) + "\n"


def _causes(rows: list[Row]) -> Iterator[str]:
    """Yield a line for each cause that keeps types from being examined, most types first."""
    types: dict[str, list[str]] = {}
    for row in rows:
        if row.problem:
            types.setdefault(_cause(row.problem), []).append(row.model_type)
    for cause, names in sorted(types.items(), key=lambda item: -len(item[1])):
        yield f"| {cause} | {len(names)}: {', '.join(names)} |"


def _cause(problem: str) -> str:
    """Say in general what a problem comes from."""
    if "timm" in problem.lower():
        return "part of it is a model of timm, which needs torchvision"
    if library := re.search(r"requires the (\w+) library|No module named '(\w+)'", problem):
        return f"needs {library[1] or library[2]}, which is not installed"
    if problem.startswith("not built"):
        return "its configuration has no defaults that make a model"
    return "torch.export does not trace it from inputs that can be guessed, and no part of it holds an FFN that traces"


def _row(row: Row) -> str:
    count = "-" if row.problem else f"{len(row.found)} / {len(row.expected)}{'' if row.right else ' ✗'}"
    marks = "*" * bool(row.shared_experts) + "†" * bool(row.parts)
    remarks = "; ".join(text for text in (row.note, row.problem, *row.refused) if text).replace("|", "\\|")
    return f"| {row.model_type}{marks} | {row.task} | {count} | {', '.join(row.forms)} | {row.applier} | {remarks} |"


def examine_missing(folder: Path) -> list[Row]:
    """Return a row for every type: what `folder` holds, and for the others what is examined now and put there."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in sorted(model_types()) if not (folder / f"{name}.json").exists()]
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=25) as pool:  # torch.export keeps memory
        for row in pool.imap_unordered(examine, missing):
            (folder / f"{row.model_type}.json").write_text(json.dumps(asdict(row), indent=1))
    return [read_row(folder / f"{name}.json") for name in sorted(model_types())]


def read_row(path: Path) -> Row:
    """Read a row that `examine_missing` wrote."""
    held = json.loads(path.read_text())
    for name in ("found", "expected"):
        held[name] = {weight: tuple(sizes) for weight, sizes in held[name].items()}
    return Row(**held | {name: tuple(held[name]) for name in ("forms", "refused")})


def main() -> None:
    """Examine the named types, or all of them in two processes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("types", nargs="*", help="model types to examine, on stdout")
    parser.add_argument("--rows", type=Path, help="folder that keeps a file for each type: delete one to examine anew")
    given = parser.parse_args()
    if not given.types:
        with tempfile.TemporaryDirectory() as own:
            (HERE / "architectures.md").write_text(table(examine_missing(given.rows or Path(own))))
        return
    rows = [examine(name) for name in given.types]
    print(*(_row(row) for row in rows), sep="\n")
    for row in rows:
        missing, extra = row.expected.keys() - row.found.keys(), row.found.keys() - row.expected.keys()
        print(row.model_type, "missing", missing, "extra", extra)


if __name__ == "__main__":
    main()
