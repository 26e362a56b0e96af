"""The `config.json` of a model, checked before transformers builds anything from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from moeify.checkpoint.folder import CONFIG
from moeify.checkpoint.quantized.schemes import FIELDS, MODULES, QUANTIZED_EXPERTS, entry_of, scheme_of
from moeify.errors import CheckpointError
from moeify.files.json_text import JsonObject, read_json_object
from moeify.files.limits import CONFIG_BYTES, CONFIG_VALUES, EXPERTS, HEADS, LABELS, LAYERS, SIZES
from moeify.files.reading import is_file
from moeify.plan import FIELD, OLDER_FORMAT

# What a model is built of, by the names that transformers' configs have for their numbers.
_COUNTS = (
    (re.compile(r"layers?$|(^|_)depths?$"), LAYERS),
    (re.compile(r"heads?$"), HEADS),
    (re.compile(r"experts"), EXPERTS),
    (re.compile(r"^num_labels$"), LABELS),
    (re.compile(r"(^|_)(dim|size)s?$|^(d_model|d_ff|n_embd|n_inner)$"), SIZES),
)
_NO_FIELDS = {"id2label", "label2id", *FIELDS, FIELD}  # what is inside is named by users, or is no config


def load_config(
    folder: Path, *, trust_remote_code: bool, dequantize: bool = False, quantized_experts: str | None = None
) -> JsonObject:
    """Read `config.json` and refuse a model that cannot be converted as it is.

    Args:
        folder: The model folder.
        trust_remote_code: Accept a config that names Python code in the folder.
        dequantize: Accept quantized weights of a format that can be undone here.
        quantized_experts: Accept experts in this form, "fp8" or "int4", as they are; "" for either, if they are those
            of `moeify.quantize_experts`.

    Raises:
        CheckpointError: The file is missing or damaged, the weights are quantized, or the model needs remote code.
    """
    path = folder / CONFIG
    if not is_file(path):
        raise CheckpointError(f"{folder} has weights but no {CONFIG}: add the one that the model was published with")
    config = read_json_object(path, CONFIG_BYTES, CONFIG_VALUES)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path} names no model_type: it is not the config of a transformers model")
    if not trust_remote_code and (field := _asks_for_code(config)):
        raise CheckpointError(
            f"{folder} asks to run Python code of its own ({field} in {CONFIG}), which is not run here: pass "
            "--trust-remote-code (in Python trust_remote_code=True) to take the class of transformers in its place"
        )
    _check_quantization(folder, entry_of(config), dequantize, quantized_experts)
    check_counts(path, config)
    return config


def check_counts(path: Path, config: Mapping[str, object]) -> None:
    """Check what a model is built of: a wrong number would keep transformers busy for ever, or take all memory.

    Raises:
        CheckpointError: One is larger than any real model's by far.
    """
    for name, value in _fields(config):
        if name.endswith("_config") and isinstance(value, str | int | float) and not isinstance(value, bool):
            raise CheckpointError(f"{path} has {name} = {value!r:.40}, expected an object: download it again")
        limit = next((limit for pattern, limit in _COUNTS if pattern.search(name)), None)
        for number in value if isinstance(value, list) else [value]:
            if limit is not None and isinstance(number, int | float) and not number <= limit:
                raise CheckpointError(f"{path} has {name} = {number:.6g}, expected at most {limit}: download it again")


def _check_quantization(folder: Path, entry: JsonObject, dequantize: bool, experts: str | None) -> None:
    scheme = scheme_of(entry)
    if scheme == FIELD:
        raise CheckpointError(f"{folder} cannot be read: {OLDER_FORMAT}")
    if scheme == QUANTIZED_EXPERTS and experts is not None:
        if experts and experts != entry.get("form"):
            raise CheckpointError(
                f"{folder} holds experts in {entry.get('form')!r:.40}, not in {experts!r}: load it as it is, or start "
                "from the checkpoint before quantization"
            )
        return
    if scheme == QUANTIZED_EXPERTS:
        raise CheckpointError(
            f"{folder} holds experts that moeify.quantize_experts has quantized, which moeify.load alone takes: start "
            "from the checkpoint before quantization"
        )
    if entry and scheme not in MODULES:
        raise CheckpointError(
            f"{folder} is quantized (scheme: {scheme}) and cannot be converted: dequantize it first, "
            "or start from the checkpoint before quantization"
        )
    if entry and not dequantize and not experts:
        raise CheckpointError(
            f"{folder} is quantized (scheme: {scheme}): pass --dequantize (in Python dequantize=True) to undo that on "
            "the way, or start from the checkpoint before quantization, which has lost nothing"
        )


def _asks_for_code(config: Mapping[str, object]) -> str | None:
    """Return the field that names code in the folder, or a kernel on the hub, which is code too."""
    for name, value in _fields(config):
        if name == "auto_map" or (name.endswith("_implementation") and "/" in str(value)):
            return name
    return None


def _fields(config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield the fields of a config and of the configs inside it."""
    for name, value in config.items():
        yield name, value
        inside = value if isinstance(value, list) else [value]
        for each in inside if name not in _NO_FIELDS else ():
            if isinstance(each, dict):
                yield from _fields(each)
