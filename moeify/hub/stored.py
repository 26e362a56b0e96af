"""Stored tensors as transformers' loader takes them: with values, read when it comes to them, or without any."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from safetensors import safe_open

from moeify.checkpoint.source import Source
from moeify.checkpoint.tensor_info import TensorInfo, torch_dtype
from moeify.errors import CheckpointError


@dataclass(frozen=True)
class Absent:
    """A tensor in name, shape and dtype only; the loader gets one on the meta device in its place."""

    info: TensorInfo

    def get_dtype(self) -> str:
        """Return the dtype, as a slice of safetensors does."""
        return self.info.dtype

    def __getitem__(self, _: object) -> Absent:
        return self

    def to(self, *, device: object, dtype: torch.dtype | None) -> torch.Tensor:
        """Return a tensor without values.

        Raises:
            CheckpointError: Numbers of another kind are stored than the model holds: a cast would change them.
        """
        dtype = dtype or torch_dtype(self.info.dtype)
        if torch_dtype(self.info.dtype).is_floating_point != dtype.is_floating_point:
            held = str(dtype).removeprefix("torch.")
            raise CheckpointError(f"tensor {self.info.name} is {self.info.dtype}, and the model holds {held} there")
        return torch.empty(self.info.shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Present:
    """A tensor in a safetensors file; no byte of it is read before the loader asks."""

    info: TensorInfo
    open: Callable[[], Any]

    def get_dtype(self) -> str:
        """Return the dtype, as a slice of safetensors does."""
        return self.info.dtype

    def get_shape(self) -> list[int]:
        """Return the shape, as a slice of safetensors does."""
        return list(self.info.shape)

    def __getitem__(self, index: object) -> torch.Tensor:
        values: torch.Tensor = self.open().get_slice(self.info.name)[index]
        return values


@dataclass(frozen=True)
class MadeWhenAsked(Present):
    """A tensor that no file holds as it is; it is put together or computed when the loader asks."""

    def __getitem__(self, index: object) -> torch.Tensor:
        values: torch.Tensor = self.open()[index]
        return values


def present(source: Source, names: Iterable[str]) -> dict[str, Present]:
    """Return those tensors of a checkpoint that lie in safetensors files: of a GGUF file, none.

    The safetensors library reads them and not the reader that a conversion uses: a proof must not share its mistakes.
    It maps a file as long as one of its tensors is used, and all that was read counts as memory. So each list of
    experts has a mapping of its own, which is gone when they are merged.
    """
    if source.computed:
        return {name: MadeWhenAsked(source.info(name), partial(source.read, name)) for name in names}
    mapped = cache(lambda file, _: safe_open(file, framework="pt"))
    spans = {name: source.span(name) for name in names}
    return {
        name: Present(source.info(name), partial(mapped, span.path, _list_of(name)))
        for name, span in spans.items()
        if span is not None
    }


def _list_of(name: str) -> str:
    """Return what stands before the last number: `model.layers.3.mlp.experts` for all experts of a layer."""
    *parts, number = re.split(r"\.\d+\.", name)
    return name[: len(name) - len(number)].rstrip(".0123456789") if parts else ""
