"""The groups of cases: which inputs are damaged, how, and what is then asked of moeify."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz import commands as do
from tests.fuzz.commands import Command
from tests.fuzz.damage import (
    code,
    config,
    files,
    gguf,
    index,
    leftovers,
    onnx,
    parts,
    pickles,
    quantized,
    runs,
    safetensors,
    side,
    yamls,
)
from tests.fuzz.sources import copy_of

Damage = Callable[[Random, Path], str]


@dataclass(frozen=True)
class Group:
    """Cases of one kind.

    Attributes:
        sources: Names of whole inputs; a case damages a copy of one.
        damages: A case takes one.
        commands: A case takes one.
        quick: Cases in `make test`.
    """

    sources: tuple[str, ...]
    damages: tuple[Damage, ...]
    commands: tuple[Command, ...]
    quick: int


@dataclass(frozen=True)
class Case:
    """A damaged input in a folder of its own, and the command that meets it.

    Attributes:
        name: Its group and number.
        damage: In words.
        source: The damaged input.
        arguments: What is typed.
        loads_only: An export, which takes ten seconds, ends when everything is loaded.
    """

    name: str
    damage: str
    source: Path
    arguments: list[str]
    loads_only: bool

    def __str__(self) -> str:
        return f"{self.name}: {self.damage}; moeify {shlex.join(self.arguments)}"[:300]


_LOADS_ONLY = 0.96  # of exports


def whole(rng: Random, src: Path) -> str:
    return "whole"


_CONVERT = (do.convert, do.convert, do.convert, do.inspect, do.families, do.verify_dense, do.export_dense)
_FOLDERS = ("llama", "llama", "gpt2", "bert", "t5", "phi3")
_CONFIG = (
    config.fields,
    config.named,
    config.named,
    config.another_architecture,
    config.text,
    config.bits,
    config.place,
)

GROUPS = {
    "safetensors bytes": Group(_FOLDERS, (safetensors.bits, safetensors.bits, safetensors.cut, safetensors.length,
                                          safetensors.place), _CONVERT, 15),
    "safetensors header": Group(_FOLDERS, (safetensors.header_text, safetensors.header_values,
                                           safetensors.header_entry, safetensors.layout), _CONVERT, 15),
    "tensors": Group(_FOLDERS, (safetensors.tensors,), _CONVERT, 12),
    "index and shards": Group(("sharded",), (index.shard_names, index.aliased, index.values, index.text, index.place,
                                             index.shard, index.shards), _CONVERT, 15),
    "parts": Group(("parts",), (parts.offsets, parts.offsets, parts.files_of_ranks, safetensors.bits,
                                safetensors.header_entry, safetensors.tensors), _CONVERT, 8),
    "quantized": Group(("fp8", "gptq", "nf4", "packed"), (quantized.settings, quantized.settings, safetensors.bits,
                                                          safetensors.header_entry, safetensors.tensors, config.named),
                       (do.convert_dequantized,), 6),
    "adapter": Group(("adapter",), (quantized.adapter, quantized.adapter, safetensors.bits, safetensors.header_entry,
                                    safetensors.tensors), (do.convert, do.convert, do.inspect), 5),
    "config": Group(_FOLDERS, _CONFIG, _CONVERT, 20),
    "gguf": Group(("llama.gguf",), (gguf.counts, gguf.metadata, gguf.metadata, gguf.tensor, gguf.tensor, gguf.bits,
                                    gguf.cut, gguf.place, gguf.tokenizer, gguf.tokenizer), _CONVERT, 22),
    "pickle": Group(("pickle",), (pickles.payload, pickles.odd_state, pickles.damaged, pickles.old_format),
                    (do.convert_pickle,), 10),
    "side files": Group(("llama",), (side.tokenizer, side.beside), (do.convert, do.convert, do.export), 8),
    "gguf out": Group(("llama",), (side.tokenizer, side.tokenizer, side.beside, safetensors.tensors),
                      (do.convert_gguf,), 5),
    "gguf to gguf": Group(("llama.gguf",), (gguf.tokenizer, gguf.metadata, gguf.tensor), (do.convert_gguf,), 4),
    "cards": Group(("llama", "bert", "llama.gguf"), (yamls.card,), (do.convert,), 8),
    "texts": Group(("mixtral", "moeify"), (side.tokenizer, side.tokenizer, whole), (do.verify_text,), 8),
    "places": Group(("llama",), (whole,), (do.odd_places,), 15),
    "options": Group(("llama",), (whole,), (do.odd_options, do.odd_options, do.odd_export), 15),
    "plans": Group(("llama",), (whole,), (do.odd_plan,), 10),
    "recipes": Group(("llama",), (whole,), (do.odd_recipe,), 15),
    "example inputs": Group(("llama",), (whole,), (do.odd_inputs,), 10),
    "moe": Group(("moeify", "mixtral"), (safetensors.bits, safetensors.cut, safetensors.header_entry,
                                         safetensors.tensors, safetensors.place, side.record, side.plan_in_config,
                                         side.other_plan, side.other_plan,
                                         *_CONFIG), (do.verify, do.verify, do.verify, do.export), 12),
    "moe again": Group(("moeify", "mixtral"), (whole, side.record, side.other_plan, safetensors.tensors,
                                               config.fields), (do.again,), 10),
    "leftovers": Group(("llama",), (leftovers.work, leftovers.work, leftovers.journal, leftovers.planted),
                       (do.go_on,), 5),
    "code": Group(("llama", "llama.gguf"), (code.planted,), (do.convert_trusted, do.inspect, do.export), 10),
    "reports": Group(("mixtral", "moeify"), (whole, side.record, side.record, side.other_plan, side.tokenizer,
                                             safetensors.tensors, config.fields), (do.report,), 4),
    "runs": Group(("run.jsonl",), (runs.line, runs.line, files.of_bytes, files.in_its_place), (do.report_run,), 8),
    "onnx": Group(("decoder.onnx",), (onnx.entries, onnx.states, onnx.graph, onnx.damaged), (do.run,), 20),
}  # fmt: skip


def make_case(seed: int, group: str, number: int, work: Path) -> Case:
    """Damage a copy of an input in an empty folder; the same three words make the same case."""
    name = f"{group}:{number}"
    rng = Random(f"{seed} {name}")
    kind = GROUPS[group]
    kind_of_input = rng.choice(kind.sources)
    (work / "foreign.txt").write_text("a file of somebody else")
    (work / ".dst.other").mkdir()
    source = copy_of(kind_of_input, work)
    damage = rng.choice(kind.damages)(rng, source)
    arguments = rng.choice(kind.commands)(rng, source)
    loads_only = arguments[0] == "export" and rng.random() < _LOADS_ONLY
    return Case(name, f"{kind_of_input}: {damage}", source, arguments, loads_only)
