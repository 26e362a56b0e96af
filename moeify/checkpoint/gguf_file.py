"""GGUF, the format of llama.cpp: read with the `gguf` library, named and laid out as transformers does it.

transformers knows how llama.cpp renames and permutes the tensors of each architecture; this module asks it for the
mapping and undoes the permutations one tensor at a time, so that a model is never in memory as a whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeify.checkpoint.tensor_info import Span, TensorInfo
from moeify.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedConfig


class GgufFile:
    """The tensors of one GGUF file under their Hugging Face names, dequantised to F32 as they are read.

    Raises:
        CheckpointError: the file is damaged, or its architecture or quantisation is not supported.
    """

    def __init__(self, file: Path) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self.files: tuple[Path, ...] = (file,)
        reader = _open(file)
        self.header_bytes = bytes(reader.data[: reader.data_offset])
        architecture = str(reader.fields["general.architecture"].contents())
        self._hf_config = _read_config(file, architecture)
        skeleton = _skeleton(self._hf_config)
        self.config: dict[str, Any] = json.loads(self._hf_config.to_json_string())
        self.config |= {"architectures": [type(skeleton).__name__], "dtype": "float32"}
        make_processor: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor = make_processor(config=self._hf_config.to_dict())
        names = {tensor.name for tensor in reader.tensors}
        self._hf_name = _names(file, architecture, skeleton, names, self._processor)
        self._stored = {self._hf_name[t.name]: t for t in reader.tensors if t.name in self._hf_name}
        _check_types(file, self._stored)
        shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        self.tensors = {name: TensorInfo(name, "F32", shapes[name]) for name in shapes if name in self._stored}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, float32, in memory of its own."""
        import numpy as np
        import torch
        from gguf import dequantize

        stored = self._stored[name]
        values = dequantize(stored.data, stored.tensor_type)
        parsed: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        done = self._processor.process(
            weights=values, name=stored.name, tensor_key_mapping=self._hf_name, parsed_parameters=parsed
        )
        # A processor may file the tensor itself (GPT-2's lm_head) instead of handing it back.
        tensor = parsed["tensors"].get(name) if done.name is None else torch.from_numpy(np.copy(done.weights))
        expected = self.tensors[name].shape
        if tensor is None or tuple(tensor.shape) != expected:
            found = None if tensor is None else list(tensor.shape)
            raise CheckpointError(f"{self.files[0]}: {name} has shape {found}, the model expects {list(expected)}.")
        return tensor

    def span(self, name: str) -> Span | None:
        """None: what is on disk is quantised or permuted."""
        return None

    def write_side_files(self, dst: Path) -> None:
        """Writes the tokenizer and the generation config that the file carries in its metadata.

        Raises:
            CheckpointError: transformers cannot build the tokenizer.
        """
        from transformers import AutoTokenizer, GenerationConfig

        file = self.files[0]
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except (ValueError, KeyError, OSError, NotImplementedError) as error:
            raise CheckpointError(f"{file}: its tokenizer cannot be rebuilt ({_first_line(error)}).") from error
        tokenizer.save_pretrained(dst)
        GenerationConfig.from_model_config(self._hf_config).save_pretrained(dst)

    def close(self) -> None:
        """Lets go of the mapped file."""
        self._stored.clear()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _open(file: Path) -> GGUFReader:
    try:
        import numpy as np
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError("reading GGUF needs the gguf package: pip install 'moeify[gguf]'.") from error

    class Reader(GGUFReader):
        """GGUFReader on a plain array: slicing a memmap once per vocabulary entry costs four times as much."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    try:
        reader = Reader(file)
        reader.fields["general.architecture"].contents()
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{file} cannot be read as GGUF, or is truncated ({error}): download it again."
        ) from error
    return reader


def _read_config(file: Path, architecture: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, OSError) as error:
        reason = _first_line(error)
        raise CheckpointError(f"{file}: the GGUF architecture {architecture!r} is not supported ({reason}).") from error
    # Where the file came from is not part of the model.
    vars(config).pop("_model_name_or_path", None)
    return config


def _skeleton(config: PreTrainedConfig) -> torch.nn.Module:
    """The model without storage: its parameter names and shapes."""
    import torch
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
    )

    auto: Any = AutoModel
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        auto = AutoModelForCausalLM
    elif type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        auto = AutoModelForSeq2SeqLM
    with torch.device("meta"):
        model: torch.nn.Module = auto.from_config(config)
    return model


class _Outline:
    """A model as far as the mapping looks at it, with its children down to a given depth.

    transformers searches every submodule and builds the whole table of names anew for each: seconds for a small model.
    Names that are not found from the top are found one level below it, in the model without its head.
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
    """GGUF name -> Hugging Face name."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    try:
        names: dict[str, str] = get_gguf_hf_weights_map(_Outline(skeleton, depth=1), processor)
        if not stored <= names.keys():
            names = get_gguf_hf_weights_map(skeleton, processor)
    except NotImplementedError as error:
        raise CheckpointError(f"{file}: the GGUF architecture {architecture!r} is not supported.") from error
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{file} already is a mixture of experts ({architecture}): start from a dense model.")
    return names


def _check_types(file: Path, stored: dict[str, Any]) -> None:
    """Finds quantisation types that gguf cannot undo, by undoing one block of each."""
    from gguf import dequantize

    seen = set()
    for tensor in stored.values():
        if tensor.tensor_type not in seen:
            seen.add(tensor.tensor_type)
            try:
                dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError as error:
                name = tensor.tensor_type.name
                raise CheckpointError(
                    f"{file}: the GGUF quantisation {name} of {tensor.name} is unknown here."
                ) from error
