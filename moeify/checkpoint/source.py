"""A checkpoint to read from, in any storage format: `open_source` finds and checks it, `Source` reads it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, TypeAlias

from moeify.checkpoint.config_file import load_config
from moeify.checkpoint.folder import (
    CARD,
    CONFIG,
    PICKLE,
    SAFETENSORS,
    SIDE_FILES,
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
from moeify.checkpoint.safetensors_file import SafetensorsFiles
from moeify.checkpoint.tensor_info import Span, TensorInfo
from moeify.errors import CheckpointError, first_line
from moeify.files.json_text import JsonObject
from moeify.files.limits import SIDE_FILE_BYTES
from moeify.files.reading import exists, is_file, is_folder, list_folder, read_bytes, user_path

if TYPE_CHECKING:
    import torch

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_ADAPTER = "adapter_config.json"
_Stored: TypeAlias = SafetensorsFiles | PickleFiles | PartFiles | GgufFile


class Source:
    """An opened checkpoint; made by `open_source`, and a context manager.

    Attributes:
        path: The folder or GGUF file.
        config: The contents of `config.json`, or the GGUF metadata as transformers translates it.
        tensors: Every tensor by its name, in the order of the files and of the data in them.
        unused: Names of tensors that are in the file and in no model of its kind; they cannot be read.
        in_parts: Whether tensors lie in parts in the files of several ranks.
    """

    def __init__(self, path: Path, config: JsonObject, stored: _Stored) -> None:
        self.path = path
        self.config = config
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(stored.tensors)
        self.unused = stored.unused if isinstance(stored, GgufFile) else ()
        self.in_parts = isinstance(stored, PartFiles)
        self._stored = stored
        self._opened = self.fingerprint()

    @property
    def model_type(self) -> str:
        """The architecture, as transformers calls it."""
        return str(self.config["model_type"])

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
        """Return where the values of a tensor lie as they are in a file; None for GGUF, pickles and parts."""
        self.info(name)
        return self._stored.span(name)

    def write_side_files(self, dst: Path) -> None:
        """Copy the files beside the weights into `dst`; for GGUF, build tokenizer and generation config."""
        if isinstance(self._stored, GgufFile):
            self._stored.write_side_files(dst)
            return
        for path in side_files(self.path):
            (dst / path.name).write_bytes(read_bytes(path, SIDE_FILE_BYTES))

    @property
    def has_tokenizer(self) -> bool:
        """Whether there are files of a tokenizer, damaged or not, or a GGUF file that holds one."""
        if isinstance(self._stored, GgufFile):
            return self._stored.has_tokenizer
        return any(is_of(path.name, TOKENIZER_FILES) for path in side_files(self.path))

    def check_side_files(self) -> None:
        """Check the files beside the weights before hours of work.

        Raises:
            CheckpointError: One of them is a link that leads outside the folder, or is damaged.
        """
        if not isinstance(self._stored, GgufFile):
            side_files(self.path)

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


def open_source(
    src: str | Path, *, allow_pickle: bool = False, trust_remote_code: bool = False, revision: str | None = None
) -> Source:
    """Open a checkpoint and check its headers; no tensor is read.

    Args:
        src: A model folder in Hugging Face layout, a GGUF file or a folder with exactly one, or a hub id.
        allow_pickle: Also accept `pytorch_model.bin`, with torch's `weights_only` guard.
        trust_remote_code: Accept a config that names Python code in the folder; the code is not run here.
        revision: Branch, tag or commit of a hub id; None for its main branch.

    Raises:
        CheckpointError: One line that says what is wrong with the checkpoint and what to do.
    """
    path = user_path(src)
    if not exists(path) and not is_file(path):  # the second says why it cannot be known
        path = _download(src, allow_pickle, revision)
    if is_folder(path):
        return _open_folder(path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path} is a file but not a .gguf file: give the folder that holds the model")
    return _open_gguf(path)


def _open_gguf(file: Path) -> Source:
    stored = GgufFile(file)
    return Source(file, stored.config, stored)


def _open_folder(folder: Path, *, allow_pickle: bool, trust_remote_code: bool) -> Source:
    open_files: type[SafetensorsFiles] | type[PickleFiles] = SafetensorsFiles
    shards = find_shards(folder, SAFETENSORS)
    if shards is None and (parts := find_parts(folder)):
        return Source(folder, load_config(folder, trust_remote_code=trust_remote_code), PartFiles(parts))
    if shards is None:
        ggufs = [path for path in list_folder(folder) if path.suffix == ".gguf" and is_file(path)]
        if len(ggufs) == 1:
            return _open_gguf(ggufs[0])
        shards, open_files = _find_pickles(folder, ggufs, allow_pickle), PickleFiles
    config = load_config(folder, trust_remote_code=trust_remote_code)
    stored = open_files(tuple(shards))
    check_index(shards, stored.file_of)
    return Source(folder, config, stored)


def _find_pickles(folder: Path, ggufs: Sequence[Path], allow_pickle: bool) -> dict[Path, set[str]]:
    if ggufs:
        names = ", ".join(file.name for file in ggufs)
        raise CheckpointError(f"{folder} holds {len(ggufs)} GGUF files: give the path of one of {names}")
    shards = find_shards(folder, PICKLE)
    if shards is None and is_file(folder / _ADAPTER):
        raise CheckpointError(
            f"{folder} is an adapter ({_ADAPTER}), which has no model of its own: load it on its base model with PEFT, "
            "merge_and_unload() it, save_pretrained() that, and give its folder"
        )
    if shards is None:
        raise CheckpointError(
            f"{folder} is not a model folder: it has no {SAFETENSORS}, no {index_name(SAFETENSORS)}, no .gguf file, "
            f"no {PICKLE} and no {index_name(PICKLE)}"
        )
    if not allow_pickle:
        raise CheckpointError(
            f"{folder} has its weights only as pickles ({next(iter(shards)).name}), a format that can carry code: "
            "use a safetensors version, or pass --allow-pickle (in Python allow_pickle=True)"
        )
    return shards


def _download(src: str | Path, allow_pickle: bool, revision: str | None) -> Path:
    if isinstance(src, Path) or not HUB_ID.fullmatch(src) or src.endswith((".gguf", ".safetensors", ".bin")):
        raise CheckpointError(f"{src} does not exist: give a model folder, a .gguf file or a hub id")
    from huggingface_hub import constants, snapshot_download

    wanted = [CONFIG, CARD, "model*.safetensors", index_name(SAFETENSORS), *SIDE_FILES]
    if allow_pickle:
        wanted += ["pytorch_model*.bin", index_name(PICKLE)]
    try:
        return Path(snapshot_download(src, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        where = f"is not a folder here, not in the hub's cache {constants.HF_HUB_CACHE}"
        raise CheckpointError(f"{src} {where}, and cannot be downloaded from the hub: {reason}") from error
