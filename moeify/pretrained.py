"""The one door to what transformers loads from files: no code of a checkpoint runs, nothing is asked on stdin.

`trust_remote_code=False` is not transformers' default: without it, transformers asks. What it raises becomes one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moeify.errors import CheckpointError, told_as
from moeify.files.json_text import parse_json, read_json_object
from moeify.files.limits import SIDE_FILE_BYTES, SIZES, VOCABULARY_VALUES
from moeify.files.reading import check_size, is_file, is_folder, list_folder, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_READ_WHOLE = {".json", ".txt", ".jinja", ".model"}  # configs, vocabularies, templates


def load_model(
    cls: type[PreTrainedModel], path: Path | None, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Iterable[str]]]:
    """Load a model, and what transformers says of missing, unexpected and mismatched tensors.

    Args:
        cls: The model's class.
        path: A folder or a GGUF file; None when `kwargs` hold the config and the tensors.
        kwargs: For `from_pretrained`.

    Raises:
        CheckpointError: Transformers does not load it.
    """
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # the info names them
    with _one_line(path, "the model"):
        loaded: Any = cls.from_pretrained(**_arguments(path), **{**options, **_unpacked(path), **kwargs})
    return cast("tuple[PreTrainedModel, dict[str, Iterable[str]]]", loaded)


def load_tensors(model: PreTrainedModel, tensors: Mapping[str, object], path: Path) -> None:
    """Load some tensors into a model that is there, in float32; the others stay what they are.

    Args:
        model: From `load_model`.
        tensors: By their names on disk; transformers renames and merges them as it does for a whole checkpoint.
        path: Where they come from, for messages.

    Raises:
        CheckpointError: Transformers does not load them.
    """
    import torch
    from transformers import modeling_utils
    from transformers.core_model_loading import convert_and_load_state_dict_in_model

    with _one_line(path, "its tensors"):
        rules: Any = modeling_utils.get_model_conversion_mapping(model)  # type: ignore[attr-defined]
        config = modeling_utils.LoadStateDictConfig(dtype=torch.float32, weight_mapping=rules)
        convert_and_load_state_dict_in_model(model, dict(tensors), config)


def load_generation_config(model: PreTrainedModel, path: Path) -> None:
    """Give a model the generation config of a folder, if there is one.

    Raises:
        CheckpointError: Transformers does not load it.
    """
    from transformers import GenerationConfig

    if model.can_generate() and (path / "generation_config.json").is_file():
        with _one_line(path, "its generation config"):
            model.generation_config = GenerationConfig.from_pretrained(path)


def load_config(path: Path) -> PreTrainedConfig:
    """Load the config of a folder or a GGUF file.

    Raises:
        CheckpointError: Transformers does not load it.
    """
    from transformers import AutoConfig

    with _one_line(path, "its config"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(**_arguments(path))
    return config


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or a GGUF file.

    Raises:
        CheckpointError: There is none, or transformers does not load it.
    """
    from transformers import AutoTokenizer

    with _one_line(path, "its tokenizer"):
        _check_vocabulary(path / "tokenizer.json")
        tokenizer = AutoTokenizer.from_pretrained(**_arguments(path))
    return cast("PreTrainedTokenizerBase", tokenizer)


def _check_vocabulary(file: Path) -> None:
    """Refuse numbers of tokens that the tokenizers library would count up to, in memory, when it writes them."""
    model = read_json_object(file, SIDE_FILE_BYTES, VOCABULARY_VALUES).get("model") if is_file(file) else None
    words = model.get("vocab") if isinstance(model, dict) else None
    numbers = words.values() if isinstance(words, dict) else ()
    largest = max((number for number in numbers if isinstance(number, int)), default=0)
    if largest > SIZES:
        raise CheckpointError(f"{file} has a token {largest}, expected at most {SIZES}: download it again")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer as transformers 4 writes it, which reads it in many engines: 5 has other names and defaults."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    fields = parse_json(read_bytes(file, SIDE_FILE_BYTES))
    if isinstance(fields, dict) and fields.get("tokenizer_class") == "TokenizersBackend":
        older = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
        if isinstance(fields.get("extra_special_tokens"), list):
            older["additional_special_tokens"] = fields.pop("extra_special_tokens")
        file.write_text(json.dumps({**fields, **older}, indent=2) + "\n")


def _unpacked(path: Path | None) -> dict[str, Any]:
    """Ask for plain weights: a transformers that can leave those of a GGUF file packed calls the model quantized."""
    import transformers

    config: Any = getattr(transformers, "GgufConfig", None)
    packed = path is not None and path.suffix == ".gguf" and config is not None
    return {"quantization_config": config(dequantize=True)} if packed else {}


def _arguments(path: Path | None) -> dict[str, Any]:
    """Name the place as transformers wants it, and forbid code."""
    place: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path is not None and path.suffix == ".gguf":
        place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {**place, "trust_remote_code": False}


@contextmanager
def _one_line(path: Path | None, what: str) -> Iterator[None]:
    """Look at the files that transformers reads as a whole, and turn whatever it raises into one line."""
    for file in [] if path is None else list_folder(path if is_folder(path) else path.parent):
        if file.suffix in _READ_WHOLE and is_file(file):
            check_size(file, SIDE_FILE_BYTES)
    with told_as(f"{'' if path is None else f'{path}: '}transformers does not load {what}", CheckpointError):
        yield
