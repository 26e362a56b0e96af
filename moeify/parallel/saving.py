"""A model whose parameters lie on several ranks, written as `save_pretrained` writes one, a tensor at a time."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moeify.checkpoint.safetensors_file import encode_header, tensor_bytes
from moeify.checkpoint.shards import OutTensor, plan_shards
from moeify.checkpoint.tensor_info import dtype_name
from moeify.checkpoint.writer import write_index
from moeify.errors import CheckpointError, ConfigError
from moeify.files.staging import staged_folder
from moeify.ranks import told_by_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHARD_BYTES = 5 * 10**9
_DONE, _FAILED = -1, -2


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model in the layout of `save_pretrained`; `moeify.load` reads it. All ranks must call it.

    The first rank writes, and asks the others for one tensor at a time: no rank holds more than one whole.

    Args:
        model: A model of transformers, parallel or not, sharded by FSDP or not, wrapped by DDP or not.
        path: A folder that does not exist.

    Raises:
        ConfigError: The model is none of transformers', or is stored in another form than it computes in.
        CheckpointError: The folder exists or cannot be written; every rank raises it.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    tensors = _stored(inner)
    _check(inner, tensors)
    link = _Asking(list(tensors.values()), path)
    if dist.is_initialized() and dist.get_rank() != 0:
        if not link.answer():
            raise CheckpointError(f"rank 0 could not write {path}: see its message")
        return
    try:
        _write(cast("PreTrainedModel", inner), tensors, link.ask, Path(path))
    except BaseException:
        with suppress(CheckpointError):  # the others have ended
            link.say(_FAILED)
        raise
    link.say(_DONE)


def _check(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    from transformers import PreTrainedModel  # the rest of the room works without
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"{type(model).__name__} is no model of transformers: save it with torch.distributed.checkpoint"
        )
    names = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
    if revert_weight_conversion(model, dict(names)).keys() != names.keys():
        raise ConfigError(
            f"{type(model).__name__} is stored in another form than it computes in: use torch.distributed.checkpoint"
        )


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """Return what is written, by name: of tied parameters the first one."""
    values: dict[str, Tensor] = model.state_dict()
    first = {name for name, _ in model.named_parameters()}
    repeated = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_save", None) or ()]
    return {
        name: value.detach()
        for name, value in values.items()
        if name not in repeated and not any(pattern.search(name) for pattern in ignored)
    }


class _Asking:
    """The first rank says which tensor it needs next, and all ranks give their parts of it.

    Args:
        tensors: In the same order on all ranks.
        path: Where they are written, for messages.
    """

    def __init__(self, tensors: list[Tensor], path: str | Path) -> None:
        self.tensors, self.path = tensors, path
        self.device = next((tensor.device for tensor in tensors), torch.device("cpu"))

    def say(self, number: int) -> None:
        """Tell the others which tensor is next, or that there is none."""
        if dist.is_initialized():
            with self.told():
                dist.broadcast(torch.tensor([number], device=self.device), src=0)

    def ask(self, number: int) -> Tensor:
        """Return a whole tensor, on the CPU."""
        tensor = self.tensors[number]
        if isinstance(tensor, DTensor):
            self.say(number)
            tensor = self._gather(tensor)
        return tensor.cpu()

    def answer(self) -> bool:
        """Give the parts that the first rank asks for; return whether it wrote everything."""
        while True:
            heard = torch.empty(1, dtype=torch.int64, device=self.device)
            with self.told():
                dist.broadcast(heard, src=0)
            number = int(heard)
            if number < 0:
                return number == _DONE
            tensor = self.tensors[number]
            assert isinstance(tensor, DTensor)
            self._gather(tensor)

    def told(self) -> AbstractContextManager[None]:
        """Turn an error of torch's into one line."""
        what = f"{self.path} was not written: rank {dist.get_rank()} lost another rank"
        return told_by_ranks(what, kind=CheckpointError)

    def _gather(self, tensor: DTensor) -> Tensor:
        with self.told():
            return tensor.full_tensor()


def _write(model: PreTrainedModel, tensors: dict[str, Tensor], ask: Callable[[int], Tensor], path: Path) -> None:
    outputs = []
    for number, (name, tensor) in enumerate(tensors.items()):
        dtype = dtype_name(tensor.dtype)
        if dtype is None:
            raise CheckpointError(f"{name} is {tensor.dtype}, which safetensors cannot hold")
        outputs.append(OutTensor(name, dtype, tuple(tensor.shape), (partial(ask, number),)))
    shards = plan_shards(outputs, _SHARD_BYTES)
    nbytes = sum(shard.nbytes for shard in shards)
    with staged_folder(path, overwrite=False, resume=False, nbytes=nbytes) as folder:
        for shard in shards:
            with (folder / shard.name).open("wb") as file:
                file.write(encode_header(tensor.info for tensor in shard.tensors))
                for output in shard.tensors:
                    for part in output.parts:
                        assert callable(part)
                        file.write(tensor_bytes(part().contiguous()))
        if len(shards) > 1:
            write_index(folder, shards)
        _write_config(model, folder)


def _write_config(model: PreTrainedModel, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    own = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))  # FSDP made one
    config.architectures = [own.__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
