"""Write docs/architectures.md: every model type that transformers registers, traced, searched and counted.

    python docs/generate_architectures.py            the whole table (`make docs`)
    python docs/generate_architectures.py llama t5   some model types, on stdout

Each type is built from its default configuration with two layers a stack, on the meta device. What the matcher finds by
dataflow is compared with a count by the names and shapes of the parameters, which knows nothing of graphs. Where the
default configuration is no valid model, and where names say too much or too little, docs/architectures.json has what
was looked up by hand.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto

from moeify.errors import MoeifyError
from moeify.passes.ffn import FFN, Inspection
from moeify.passes.find_ffn import FindFFN
from moeify.planning.placement import Places
from moeify.tracing.trace import UNTRACED, trace

HERE = Path(__file__).resolve().parent
LAYERS = 2
Sizes = dict[str, tuple[int, int]]  # name of the weight that leads back -> (hidden, intermediate)

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

# How FFNs are named, one convention a row: the projection back, then those that may lead to it.
NAMES: dict[str, tuple[str, ...]] = {
    "down_proj": ("up_proj", "gate_up_proj"), "fc2": ("fc1",), "fc_2": ("fc_1",), "wo": ("wi", "wi_0"), "w2": ("w1",),
    "c_proj": ("c_fc",), "lin2": ("lin1",), "linear2": ("linear1",), "linear_2": ("linear_1",), "fc_out": ("fc_in",),
    "dense_4h_to_h": ("dense_h_to_4h",), "output.dense": ("intermediate.dense",), "w_out": ("w_in.w_0",),
    "output_dense": ("intermediate_dense",), "ffn_output": ("ffn",), "layer_2": ("layer_1",), "pwconv2": ("pwconv1",),
    "pointwise_conv2": ("pointwise_conv1",), "linear_fc2": ("linear_fc1",), "dense2": ("dense1",), "2": ("0",),
    "output_linear": ("input_linear",), "proj_out": ("proj_in", "up_proj"), "layers.1": ("layers.0",), "3": ("1", "0"),
    "w_2": ("w_1",), "layer2": ("layer1",), "linear_out": ("linear_in",), "final_dense": ("intermediate_dense",),
    "proj_2": ("proj_1",), "lin_2": ("lin_1",), "dense_2": ("dense_1",), "Wo": ("Wi",),
    "down_proj.linear": ("up_proj.linear",), "conv2.convolution": ("conv1.convolution",),
}  # fmt: skip
# What has such names and is something else: convolution modules, projectors between towers, heads, codecs.
OTHER = re.compile(
    r"conv(_module)?\.pointwise_conv|merger|connector|project(or|ion)|aligner|bbox|quantizer|upsample|vocoder|_head|pooler"
    r"|spatial_linear|temporal_linear|object_pointer_proj|hypernetworks|output_layer"
)


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
    found = FindFFN()(graph_module)
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
        applier=_applier(found.ffns, Places(graph_module)),
        note=row.note,
    )


def build(model_type: str, task: str, changes: dict[str, Any]) -> nn.Module:
    """Build a small model on the meta device: default widths, two layers."""
    config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    top = {name: value for name, value in changes.items() if "." not in name}
    config = config_class(**top)
    _cut(config, set())
    for path, value in changes.items():
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
            model = getattr(transformers, name if isinstance(name, str) else name[0])(config)
    return model


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


def by_name(model: nn.Module, also: list[str], without: list[str]) -> Sizes:
    """Find FFNs by the names and shapes of parameters; `also` and `without` are patterns looked up by hand."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith(".weight")}
    found: Sizes = {}
    for name, shape in shapes.items():
        pairs = [(down, up) for down, ups in NAMES.items() for up in ups if name.endswith(f".{down}.weight")]
        ups = [shapes.get(f"{name[: -len(down) - 7]}{up}.weight") for down, up in pairs]
        stored_in_out = type(model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"
        sizes = next((size for up in ups if up and (size := _sizes(shape, up, stored_in_out))), None)
        other = re.search(r"\bexperts\.\d", name) or OTHER.search(name)
        if any(re.search(pattern, name) for pattern in also):
            sizes, other = (shape[0], shape[1]), None
        if sizes and not other and not any(re.search(pattern, name) for pattern in without):
            found[name] = sizes
    return found


def _sizes(down: tuple[int, ...], up: tuple[int, ...], stored_in_out: bool) -> tuple[int, int] | None:
    """Return (hidden, intermediate) if a pair of weights leads from a width and back to it."""
    if len(down) < 2 or len(up) < 2 or set(down[2:]) | set(up[2:]) > {1}:
        return None
    (hidden, inner), (rows, width) = (s[1::-1] if stored_in_out else s[:2] for s in (down, up))
    return (hidden, inner) if width == hidden and rows in {inner, 2 * inner} else None


def _applier(ffns: tuple[FFN, ...], places: Places) -> str:
    graph_only = 0
    for ffn in ffns:
        try:
            places.place(ffn)
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
    dense = [row for row in rows if not row.problem]
    right = sum(row.right for row in dense)
    wrong = [row for row in dense if not row.right]
    corrected = sum(bool({"also", "not"} & looked_up(row.model_type).keys()) for row in rows)
    extra = sum(bool(row.found.keys() - row.expected.keys()) for row in dense)
    lines = [
        "# Architectures",
        "",
        f"Every model type that transformers {transformers.__version__} registers for language, vision and audio,",
        "built with two layers a stack on the meta device, traced, and searched for dense FFNs. This page is written",
        "by `make docs`. Expected numbers are counted by the names and shapes of parameters; for the types of",
        f"docs/architectures.json that name patterns ({corrected}), names said too much or too little, and a look at",
        "the model after the two disagreed decided.",
        "",
        f"{len(rows)} types: {right} with exactly the expected FFNs, {len(wrong)} not "
        f"({extra} of them with something that is no FFN), {len(rows) - len(dense)} that could not be built or traced.",
        "",
        "`*` some of the FFNs are shared experts of an MoE that the model already has. `†` parts of the model were",
        "traced by themselves. `graph`: the FFN is written into its block, so that only the graph passes replace it.",
        "",
        "| model type | task | found / expected | form | applier | refused, and notes |",
        "|---|---|--:|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(row) for row in rows)]) + "\n"


def _row(row: Row) -> str:
    count = "-" if row.problem else f"{len(row.found)} / {len(row.expected)}{'' if row.right else ' ✗'}"
    marks = "*" * bool(row.shared_experts) + "†" * bool(row.parts)
    remarks = "; ".join(text for text in (row.note, row.problem, *row.refused) if text).replace("|", "\\|")
    return f"| {row.model_type}{marks} | {row.task} | {count} | {', '.join(row.forms)} | {row.applier} | {remarks} |"


def main() -> None:
    """Examine the named types, or all of them in two processes."""
    chosen = sys.argv[1:] or sorted(model_types())
    if sys.argv[1:]:
        rows = [examine(name) for name in chosen]
        print(*(_row(row) for row in rows), sep="\n")
        for row in rows:
            print(row.model_type, "missing", row.expected.keys() - row.found.keys(), "extra",
                  row.found.keys() - row.expected.keys())  # fmt: skip
        return
    with ProcessPoolExecutor(2, max_tasks_per_child=50) as pool:
        rows = list(pool.map(examine, chosen))
    (HERE / "architectures.md").write_text(table(rows))


if __name__ == "__main__":
    main()
