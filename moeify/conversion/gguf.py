"""The applier for GGUF: a dense checkpoint in, one file for llama.cpp out, in the memory of a few tensors.

The first layers are written as a native checkpoint too, for the proof, and are removed with it. The file holds what
llama.cpp's converter makes of the whole native checkpoint.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moeify.checkpoint.folder import CARD, CONFIG
from moeify.checkpoint.gguf_vocabulary import add_vocabulary, quiet
from moeify.checkpoint.gguf_writer import TYPES, GgufTensor, announce, part_values, write_gguf
from moeify.checkpoint.shards import OutTensor
from moeify.checkpoint.source import Source
from moeify.checkpoint.writer import plan_files, write_shards
from moeify.conversion.card import model_card
from moeify.conversion.checkpoint import Callbacks, output_config
from moeify.conversion.dense import DenseCheckpoint
from moeify.conversion.output_tensors import output_tensors
from moeify.families.base import Config, as_it_is, layer_number
from moeify.families.gguf import gguf_of, keys, rope_tensors, stacked, stored_as
from moeify.families.table import FAMILIES
from moeify.files.staging import check_space, staged_file
from moeify.plan import Plan

if TYPE_CHECKING:
    from gguf import GGUFWriter

_PROVEN = 2  # converted layers, as in the proof of a slice
_ONE_FILE = 2**62
_RECORD = "moeify.json"  # a key for what lies beside a folder under this name
# What llama.cpp computes in float32 whatever the rest is, besides norms, biases and other vectors.
_FLOAT32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "shortconv.conv.weight", "ssm_conv1d.weight",
            "_norm.weight")  # fmt: skip
_FILE_TYPES = dict(zip(TYPES, ("ALL_F32", "MOSTLY_F16", "MOSTLY_BF16", "MOSTLY_Q8_0"), strict=True))


@dataclass(frozen=True)
class GgufOutput:
    """What is written, and where.

    Attributes:
        file: The output; it appears whole or not at all.
        kind: Type of the weights, one of `moeify.checkpoint.gguf_writer.TYPES`; None for the source's dtype.
        overwrite: Replace `file`.
        command: The command that asked for it.
    """

    file: Path
    kind: str | None = None
    overwrite: bool = False
    command: str | None = None


def convert_to_gguf(dense: DenseCheckpoint, plan: Plan, output: GgufOutput, callbacks: Callbacks) -> None:
    """Write the converted model as a GGUF file.

    Args:
        dense: The dense checkpoint.
        plan: What `plan_checkpoint` returned for GGUF, or a saved plan that `check_plan` accepted for it.
        output: What is written, and where.
        callbacks: What is called meanwhile. `check` gets a folder with the layers up to the second converted one.

    Raises:
        CheckpointError: The source lacks a tensor or changes meanwhile, the output cannot be written, or llama.cpp has
            no such tokenizer.
        RefusedError: llama.cpp has no place for a tensor, or the type cannot hold it.
    """
    source, config = dense.source, output_config(dense, plan, None)
    kind = output.kind or _kind_of(dense.info(plan.sites[0].down.parameter).dtype)
    tensors = list(_tensors(dense, plan, config, kind, callbacks.unused))
    stop = sorted(map(layer_number, plan.sites))[:_PROVEN][-1] + 1
    first = [each for each in output_tensors(dense, plan, None, lambda _: None) if _is_before(each.name, stop)]
    total = sum(tensor.nbytes for tensor in tensors)
    check_space(output.file, total + sum(each.nbytes for each in first))
    callbacks.total(total)
    nonfinite = _once(callbacks.nonfinite)
    with staged_file(output.file, overwrite=output.overwrite, sources=source.folders) as staged:
        folder = staged.with_name(output.file.stem)
        folder.mkdir()
        files = plan_files(source, first, _ONE_FILE, plan_key="")
        write_shards(files, folder, resume=False, on_bytes=lambda _: None, on_nonfinite=nonfinite)
        (folder / CONFIG).write_text(json.dumps(config))
        proof = callbacks.check(folder)
        gc.collect()  # the hooks of its models' layers know them, so they would stay
        (folder / CARD).write_text(model_card(dense, plan, folder.name, proof, output.command), "utf-8")
        writer = _described(source, plan, config, folder, tensors)
        writer.add_file_type(_file_type(kind))
        writer.add_string(_RECORD, json.dumps({**plan.to_dict(), "verification": proof}))
        shutil.rmtree(folder)
        write_gguf(source, writer, staged, tensors, callbacks.written, nonfinite)
        source.check_unchanged()


def _kind_of(dtype: str) -> str:
    return dtype if dtype in TYPES else "F32"


def _file_type(kind: str) -> int:
    from gguf import LlamaFileType

    return LlamaFileType[_FILE_TYPES[kind]]


def _is_before(name: str, stop: int) -> bool:
    """Return whether a tensor is outside of the layers, or in one before a number."""
    found = re.search(r"\.(\d+)\.", name)
    return found is None or int(found[1]) < stop


def _once(call: Callable[[str], None]) -> Callable[[str], None]:
    said: set[str] = set()

    def first_time(name: str) -> None:
        if name not in said:
            said.add(name)
            call(name)

    return first_time


def _tensors(
    dense: DenseCheckpoint, plan: Plan, config: Config, kind: str, unused: Callable[[Sequence[str]], None]
) -> Iterator[GgufTensor]:
    """Describe every tensor of the file."""
    form = gguf_of(plan, config)
    for tensor in output_tensors(dense, plan, None, unused, stacked(FAMILIES[plan.target], form)):
        for name, compute in stored_as(form, config["num_hidden_layers"], tensor.name).items():
            shape, parts = tensor.shape, tensor.parts
            if compute is not as_it_is:
                shape = tuple(compute(torch.empty(shape, device="meta"), config).shape)
                parts = (partial(_computed, dense.source, config, tensor, compute),)
            yield GgufTensor(name, _held_as(name, shape, kind), shape, parts)
    for name, values in rope_tensors(config).items():
        yield GgufTensor(name, "F32", tuple(values.shape), (partial(_itself, values),))


def _itself(values: torch.Tensor) -> torch.Tensor:
    return values


def _held_as(name: str, shape: Sequence[int], kind: str) -> str:
    plain = len(shape) < 2 or name.endswith(_FLOAT32) or not name.endswith(".weight")
    return "F32" if plain else kind


def _computed(
    source: Source, config: Config, tensor: OutTensor, compute: Callable[[torch.Tensor, Config], torch.Tensor]
) -> torch.Tensor:
    values = torch.cat([part_values(source, part).reshape(-1) for part in tensor.parts])
    return compute(values.reshape(tensor.shape), config)


def _described(
    source: Source, plan: Plan, config: dict[str, Any], folder: Path, tensors: Sequence[GgufTensor]
) -> GGUFWriter:
    """Return a writer that knows all but the values: tensors, what the model is and where it comes from, its tokenizer.

    Args:
        source: The dense checkpoint, whose tokenizer is taken over if it is a GGUF file.
        plan: What is converted.
        config: Of the MoE.
        folder: The native checkpoint, named like the output, with its README.md.
        tensors: To be written.
    """
    import gguf

    form = gguf_of(plan, config)
    writer = gguf.GGUFWriter(None, form.architecture)
    announce(writer, tensors)
    total, *rest = writer.get_total_parameter_count()
    with quiet():
        metadata = gguf.Metadata.load(None, folder, None, total)
        metadata.name = metadata.name or folder.name
        metadata.size_label = metadata.size_label or gguf.size_label(total, *rest)
        writer.add_type(gguf.GGUFType.MODEL)
        metadata.set_gguf_meta_model(writer)
    for name, value in keys(plan, config).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if not source.copy_tokenizer(writer):
        add_vocabulary(writer, folder, config["vocab_size"], form.characters)
    return writer
