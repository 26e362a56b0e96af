"""A checkpoint to read from, in any storage format: `open_source` finds and checks it, `Source` reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from moeify.checkpoint.adapter import ADAPTER, ADAPTER_WEIGHTS, Adapter, merged, read_adapter
from moeify.checkpoint.config_file import load_config
from moeify.checkpoint.derived import DerivedFiles
from moeify.checkpoint.download import download
from moeify.checkpoint.folder import (
    PICKLE,
    SAFETENSORS,
    TOKENIZER_FILES,
    check_index,
    find_shards,
    index_name,
    is_of,
    side_files,
)
from moeify.checkpoint.gguf_file import GgufFile
from moeify.checkpoint.part_files import PartFiles, find_parts
from moeify.checkpoint.pickle_file import PickleFiles
from moeify.checkpoint.quantized.schemes import QUANTIZED_EXPERTS, entry_of, scheme_of
from moeify.checkpoint.safetensors_file import SafetensorsFiles
from moeify.checkpoint.tensor_info import Span, TensorInfo
from moeify.errors import CheckpointError
from moeify.files.json_text import JsonObject
from moeify.files.limits import SIDE_FILE_BYTES
from moeify.files.reading import exists, is_file, is_folder, list_folder, read_bytes, user_path

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter

_Stored: TypeAlias = SafetensorsFiles | PickleFiles | PartFiles | GgufFile | DerivedFiles


class Source:
    """An opened checkpoint; made by `open_source`, and a context manager.

    Attributes:
        path: The folder or GGUF file.
        base: The model that an adapter changes; None for a whole one.
        config: The contents of `config.json`, or the GGUF metadata as transformers translates it.
        tensors: Every tensor by its name, in the order of the files and of the data in them.
        unused: Names of tensors that are in the file and in no model of its kind; they cannot be read.
        computed: Whether some tensors lie in no file as they are: only `read` puts them together.
    """

    def __init__(self, path: Path, config: JsonObject, stored: _Stored, base: Source | None = None) -> None:
        self.path, self.base = path, base
        self.config = config
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(stored.tensors)
        self.unused = stored.unused if isinstance(stored, GgufFile) else ()
        self.computed = isinstance(stored, PartFiles | DerivedFiles)
        self._stored = stored
        self._opened = self.fingerprint()

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where it lies, and where its base model lies."""
        return (self.path, *(() if self.base is None else self.base.folders))

    @property
    def model_type(self) -> str:
        """The architecture, as transformers calls it."""
        return str(self.config["model_type"])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Return what is known of a tensor.

        Raises:
            CheckpointError: The checkpoint has no tensor of this name; `read` and `span` raise it too.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name} among its {len(self.tensors)}")
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor to the CPU, into memory of its own.

        Raises:
            CheckpointError: The file has changed since it was opened.
        """
        self.info(name)
        return self._stored.read(name)

    def span(self, name: str) -> Span | None:
        """Return where the values of a tensor lie as they are in a file; None for GGUF, pickles, computed tensors."""
        self.info(name)
        return self._stored.span(name)

    def write_side_files(self, dst: Path) -> None:
        """Copy side files into `dst`, an adapter's after its base model's; for GGUF build tokenizer and settings."""
        if self.base is not None:
            self.base.write_side_files(dst)
        if isinstance(self._stored, GgufFile):
            self._stored.write_side_files(dst)
            return
        for path in side_files(self.path):
            (dst / path.name).write_bytes(read_bytes(path, SIDE_FILE_BYTES))

    def copy_tokenizer(self, writer: GGUFWriter) -> bool:
        """Add the tokenizer of a GGUF file to another; return whether this is one, and has one."""
        return isinstance(self._stored, GgufFile) and self._stored.copy_tokenizer(writer)

    @property
    def tokenizer_path(self) -> Path | None:
        """Where a tokenizer lies, damaged or not: this folder or GGUF file, or that of an adapter's base model."""
        if isinstance(self._stored, GgufFile):
            return self.path if self._stored.has_tokenizer else None
        if any(is_of(path.name, TOKENIZER_FILES) for path in side_files(self.path)):
            return self.path
        return None if self.base is None else self.base.tokenizer_path

    def check_side_files(self) -> None:
        """Check the files beside the weights before hours of work.

        Raises:
            CheckpointError: One of them is a link that leads outside the folder, or is damaged.
        """
        if self.base is not None:
            self.base.check_side_files()
        if not isinstance(self._stored, GgufFile):
            side_files(self.path)

    def merged(self, adapter: Adapter, stored: SafetensorsFiles | PickleFiles) -> Source:
        """Return this model with an adapter in its weights.

        Raises:
            CheckpointError: They do not fit each other.
        """
        return Source(adapter.folder, self.config, merged(adapter, stored, self._stored), self)

    def fingerprint(self) -> str:
        """Return a digest that changes with the source: headers, config, and what the system says of its files."""
        digest = hashlib.sha256(self._stored.header_bytes)
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        for file in self._stored.files:
            status = file.stat()
            digest.update(f"{file.name} {status.st_ino} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Check that the files are those that were opened.

        Raises:
            CheckpointError: A file was written, replaced or removed since.
        """
        try:
            unchanged = self.fingerprint() == self._opened
        except OSError as error:
            raise CheckpointError(f"{error.filename} was removed while it was read: nothing was written") from error
        if not unchanged:
            raise CheckpointError(f"{self.path} changed while it was read: nothing was written; run again")

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the files: GGUF files and pickles are mapped while the source is open."""
        self._stored.close()


class Accepted(TypedDict, total=False):
    """What is accepted of a checkpoint; see `open_source`."""

    allow_pickle: bool
    trust_remote_code: bool
    dequantize: bool
    quantized_experts: str | None


def open_source(
    src: str | Path,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    dequantize: bool = False,
    quantized_experts: str | None = None,
    revision: str | None = None,
) -> Source:
    """Open a checkpoint and check its headers; no tensor is read.

    Args:
        src: A model folder in Hugging Face layout, a GGUF file or a folder with exactly one, or a hub id.
        allow_pickle: Also accept `pytorch_model.bin`, with torch's `weights_only` guard.
        trust_remote_code: Accept a config that names Python code in the folder; the code is not run here.
        dequantize: Also accept quantized weights (FP8, bitsandbytes, GPTQ, AWQ, compressed-tensors), and read them as
            if they were not.
        quantized_experts: Also accept experts in this form, and read them as they are (see `load_config`).
        revision: Branch, tag or commit of a hub id; None for its main branch.

    Raises:
        CheckpointError: One line that says what is wrong with the checkpoint and what to do.
    """
    path = user_path(src)
    accepted: Accepted = {
        "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
        "dequantize": dequantize,
        "quantized_experts": quantized_experts,
    }
    if not exists(path) and not is_file(path):  # the second says why it cannot be known
        path = download(src, allow_pickle, revision)
    if is_folder(path):
        return _open_folder(path, accepted)
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path} is a file but not a .gguf file: give the folder that holds the model")
    return _open_gguf(path)


def _open_gguf(file: Path) -> Source:
    stored = GgufFile(file)
    return Source(file, stored.config, stored)


def _open_folder(folder: Path, accepted: Accepted) -> Source:
    open_files: type[SafetensorsFiles] | type[PickleFiles] = SafetensorsFiles
    shards = find_shards(folder, SAFETENSORS)
    if shards is None and (parts := find_parts(folder)):
        return _plain(folder, _config(folder, accepted), PartFiles(parts), accepted)
    if shards is None and is_file(folder / ADAPTER):
        return _open_adapter(folder, accepted)
    if shards is None:
        ggufs = [path for path in list_folder(folder) if path.suffix == ".gguf" and is_file(path)]
        if len(ggufs) == 1:
            return _open_gguf(ggufs[0])
        shards, open_files = _find_pickles(folder, ggufs, accepted["allow_pickle"]), PickleFiles
    config = _config(folder, accepted)
    stored = open_files(tuple(shards))
    check_index(shards, stored.file_of)
    return _plain(folder, config, stored, accepted)


def _config(folder: Path, accepted: Accepted) -> JsonObject:
    trust, whole, form = accepted["trust_remote_code"], accepted["dequantize"], accepted["quantized_experts"]
    return load_config(folder, trust_remote_code=trust, dequantize=whole, quantized_experts=form)


def _plain(folder: Path, config: JsonObject, stored: _Stored, accepted: Accepted) -> Source:
    """Return the source, without its quantization if it has one, which was accepted."""
    if not (entry := entry_of(config)) or scheme_of(entry) == QUANTIZED_EXPERTS:
        return Source(folder, config, stored)
    from moeify.checkpoint.quantized.files import dequantized

    form = None if accepted["dequantize"] else accepted["quantized_experts"]
    derived, plain = dequantized(stored, config, folder, form)
    return Source(folder, plain, derived)


def _open_adapter(folder: Path, accepted: Accepted) -> Source:
    adapter, (safe, pickled) = read_adapter(folder), (folder / name for name in ADAPTER_WEIGHTS)
    if not is_file(safe) and not is_file(pickled):
        raise CheckpointError(f"{folder} is an adapter without {safe.name}: download it again")
    if not is_file(safe) and not accepted["allow_pickle"]:
        raise _is_pickled(folder, pickled)
    stored = SafetensorsFiles((safe,)) if is_file(safe) else PickleFiles((pickled,))
    near = [path for path in (user_path(adapter.base), folder / adapter.base) if is_folder(path)]
    base = near[0] if near else download(adapter.base, accepted["allow_pickle"], adapter.revision, cached=True)
    if is_file(base / ADAPTER) and find_shards(base, SAFETENSORS) is None:
        raise CheckpointError(f"{folder} is an adapter of {base}, which is one too: merge that with PEFT first")
    return _open_folder(base, accepted).merged(adapter, stored)


def _is_pickled(folder: Path, file: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} has its weights only as pickles ({file.name}), a format that can carry code: "
        "use a safetensors version, or pass --allow-pickle (in Python allow_pickle=True)"
    )


def _find_pickles(folder: Path, ggufs: Sequence[Path], allow_pickle: bool) -> dict[Path, set[str]]:
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise CheckpointError(f"{folder} holds {len(ggufs)} GGUF files: give the path of one of {names}")
    shards = find_shards(folder, PICKLE)
    if shards is None:
        raise CheckpointError(
            f"{folder} is not a model folder: it has no {SAFETENSORS}, no {index_name(SAFETENSORS)}, no .gguf file, "
            f"no {PICKLE} and no {index_name(PICKLE)}"
        )
    if not allow_pickle:
        raise _is_pickled(folder, next(iter(shards)))
    return shards
