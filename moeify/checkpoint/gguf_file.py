"""GGUF, the format of llama.cpp: read with the `gguf` library, with names and layouts as in transformers.

transformers knows how llama.cpp renames and permutes the tensors of each architecture. This module asks it for the
mapping and undoes the permutations one tensor at a time, so that the whole model is never in memory.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moeify.checkpoint.config_file import check_counts
from moeify.checkpoint.gguf_header import Place, check_header, check_layers
from moeify.checkpoint.tensor_info import TensorInfo
from moeify.errors import CheckpointError, first_line
from moeify.files.json_text import JsonObject, parse_json
from moeify.files.limits import LAYERS
from moeify.files.reading import check_unchanged, state_of
from moeify.pretrained import load_config, load_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, ReaderTensor
    from transformers import PreTrainedConfig

_TOKENIZER = "tokenizer.ggml.model"


class GgufFile:
    """The tensors of one GGUF file under their Hugging Face names, dequantized to F32 as they are read.

    Raises:
        CheckpointError: The file is damaged, or its architecture or quantization is not supported.
    """

    def __init__(self, file: Path) -> None:
        from transformers import modeling_gguf_pytorch_utils as utils

        self.files: tuple[Path, ...] = (file,)
        self._state = state_of(file)
        reader, places = open_gguf(file)
        self.header_bytes = bytes(reader.data[: reader.data_offset])
        self.has_tokenizer = _TOKENIZER in reader.fields
        architecture = str(reader.fields["general.architecture"].contents())
        self._hf_config = _read_config(file, architecture)
        self.config = cast("JsonObject", parse_json(self._hf_config.to_json_string()))
        check_counts(file, self.config)
        skeleton = _skeleton(file, self._hf_config)
        self.config |= {"architectures": [type(skeleton).__name__], "dtype": "float32"}
        processor: Any = utils.TENSOR_PROCESSORS.get(architecture, utils.TensorProcessor)
        self._processor = processor(config=self._hf_config.to_dict())
        names = {tensor.name for tensor in reader.tensors}
        self._hf_name = _names(file, architecture, skeleton, names, self._processor)
        self._stored = {self._hf_name[t.name]: t for t in reader.tensors if t.name in self._hf_name}
        _check_types(file, self._stored.values())
        self.unused = tuple(t.name for t in reader.tensors if t.name not in self._hf_name)
        check_layers(file, self.unused, int(getattr(self._hf_config, "num_hidden_layers", LAYERS)))
        shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        self.tensors = {name: TensorInfo(name, "F32", shapes[name]) for name in shapes if name in self._stored}
        for name, info in self.tensors.items():
            found = places[self._stored[name].name].shape
            if prod(found) != prod(info.shape):  # the order of the dimensions is known when the tensor is read
                raise self._wrong_shape(name, found)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in float32, in memory of its own."""
        import numpy as np
        import torch
        from gguf import dequantize

        check_unchanged(self.files[0], self._state)
        stored = self._stored[name]
        values = dequantize(stored.data, stored.tensor_type)
        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        try:
            done = self._processor.process(
                weights=values, name=stored.name, tensor_key_mapping=self._hf_name, parsed_parameters=parsed
            )
        except (ValueError, TypeError, ZeroDivisionError) as error:  # the metadata and the shape do not fit
            raise self._wrong_shape(name, values.shape) from error
        # A processor may put the tensor into `parsed` itself (GPT-2's lm_head) instead of returning it.
        own = np.copy(done.weights) if np.may_share_memory(done.weights, stored.data) else done.weights
        tensor = parsed["tensors"].get(name) if done.name is None else torch.from_numpy(np.ascontiguousarray(own))
        if tensor is None or tuple(tensor.shape) != self.tensors[name].shape:
            raise self._wrong_shape(name, () if tensor is None else tensor.shape)
        return tensor

    def _wrong_shape(self, name: str, found: Sequence[int]) -> CheckpointError:
        what = f"{name} has shape {list(found)}, the model expects {list(self.tensors[name].shape)}"
        return CheckpointError(f"{self.files[0]}: {what}: download it again")

    def span(self, name: str) -> None:
        """Return None: the bytes on disk are quantized or permuted."""

    def write_side_files(self, dst: Path) -> None:
        """Write the tokenizer, if there is one, and the generation config from the metadata of the file.

        Raises:
            CheckpointError: transformers cannot build the tokenizer.
        """
        from transformers import GenerationConfig

        if self.has_tokenizer:
            save_tokenizer(load_tokenizer(self.files[0]), dst)
        GenerationConfig.from_model_config(self._hf_config).save_pretrained(dst)

    def copy_tokenizer(self, writer: GGUFWriter) -> bool:
        """Add the tokenizer to another GGUF file as it is in this one; return whether there is one."""
        from gguf import GGUFValueType

        for name, field in open_gguf(self.files[0])[0].fields.items():
            kind, item = field.types[0], field.types[-1]
            values = [field.parts[place] for place in field.data]
            if not name.startswith("tokenizer.") or not values:
                continue
            plain = [v.tobytes() if item == GGUFValueType.STRING else v.tolist()[0] for v in values]
            is_array = kind == GGUFValueType.ARRAY
            writer.add_key_value(name, plain if is_array else plain[0], kind, item if is_array else None)
        return self.has_tokenizer

    def close(self) -> None:
        """Release the mapped file."""
        self._stored.clear()


def open_gguf(file: Path) -> tuple[GGUFReader, dict[str, Place]]:
    """Check the header of a file, then map it.

    Raises:
        CheckpointError: The file is damaged, or the gguf package is missing.
    """
    try:
        import numpy as np
        from gguf import GGML_QUANT_SIZES, GGUFReader
    except ImportError as error:
        raise CheckpointError("reading GGUF needs the gguf package: pip install 'moeify[gguf]'") from error

    class Reader(GGUFReader):
        """GGUFReader on a plain array: slicing a memmap once for each vocabulary entry costs four times as much."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    places = check_header(file, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})
    try:
        reader = Reader(file)
        reader.fields["general.architecture"].contents()
    except Exception as error:  # whatever the library raises, the file is what the user can change
        reason = first_line(error)
        raise CheckpointError(
            f"{file} cannot be read as GGUF, or is truncated ({reason}): download it again"
        ) from error
    return reader, places


def _read_config(file: Path, architecture: str) -> PreTrainedConfig:
    try:
        config = load_config(file)
    except CheckpointError as error:
        raise _unsupported(file, architecture, f" ({error})") from error
    vars(config).pop("_model_name_or_path", None)  # the place of the file is not part of the model
    return config


def _unsupported(file: Path, architecture: str, reason: str = "") -> CheckpointError:
    return CheckpointError(f"{file}: the GGUF architecture {architecture!r} is not supported{reason}")


def _skeleton(file: Path, config: PreTrainedConfig) -> torch.nn.Module:
    """Return the model without storage: its parameter names and shapes.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    import torch
    import transformers as tf

    choices = (
        (tf.MODEL_FOR_CAUSAL_LM_MAPPING, tf.AutoModelForCausalLM),
        (tf.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, tf.AutoModelForSeq2SeqLM),
    )
    auto: Any = next((auto for mapping, auto in choices if type(config) in mapping), tf.AutoModel)
    try:
        with torch.device("meta"):
            return cast("torch.nn.Module", auto.from_config(config))
    except Exception as error:  # for wrong numbers it raises errors of every kind
        raise CheckpointError(f"{file}: no model can be built from its metadata ({first_line(error)})") from error


class _Outline:
    """A model as far as the mapping looks at it, with its children down to a given depth.

    transformers searches every submodule and builds the whole table of names again for each: seconds for a small model.
    Names that it does not find from the top are found one level below, in the model without its head.
    """

    def __init__(self, model: torch.nn.Module, depth: int) -> None:
        self.config = getattr(model, "config", None)
        self.state_dict = model.state_dict
        self._model = model
        self._depth = depth

    def named_children(self) -> list[tuple[str, _Outline]]:
        children = self._model.named_children() if self._depth else ()
        return [(name, _Outline(child, self._depth - 1)) for name, child in children]


def _names(
    file: Path, architecture: str, skeleton: torch.nn.Module, stored: set[str], processor: Any
) -> dict[str, str]:
    """Return the Hugging Face names by the GGUF names."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    try:
        names: dict[str, str] = get_gguf_hf_weights_map(_Outline(skeleton, depth=1), processor)
        if not stored <= names.keys():
            names = get_gguf_hf_weights_map(skeleton, processor)
    except NotImplementedError as error:
        raise _unsupported(file, architecture) from error
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{file} is a Mixture-of-Experts already ({architecture}): start from a dense model")
    return names


def _check_types(file: Path, stored: Iterable[ReaderTensor]) -> None:
    """Refuse quantization types that gguf cannot undo; one block of each type is tried."""
    from gguf import dequantize

    first_of: dict[GGMLQuantizationType, ReaderTensor] = {}
    for tensor in stored:
        first_of.setdefault(tensor.tensor_type, tensor)
    for kind, tensor in first_of.items():
        try:
            dequantize(tensor.data[:1], kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{file}: the GGUF quantization {kind.name} of {tensor.name} is not known to the gguf package"
            ) from error
