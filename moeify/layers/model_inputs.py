"""What a model was called with, for the MoE layers inside it: the padding mask and the token ids.

A layer sees activations only. The nearest module around it whose forward takes `input_ids` and `attention_mask` passes
both on through a forward hook, into one `ModelInputs` that the layers below share.

Shape legend: B sequences, L positions, T = B·L tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_NAMES = ("input_ids", "attention_mask")


class ModelInputs:
    """The padding mask and the token ids of the current or the last forward pass.

    Args:
        names: Names of the positional parameters of the forward.
    """

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = names
        self.token_ids: Tensor | None = None
        self.mask: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the arguments of a module's forward: a forward pre-hook."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.token_ids, self.mask = given.get("input_ids"), given.get("attention_mask")

    def forget(self, *_: Any) -> None:
        """Drop the arguments of an export when it is over: they are fake tensors of that export. A forward hook."""
        if exporting():
            self.token_ids = self.mask = None

    def tokens(
        self, x: Tensor, token_ids: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the mask (T,) bool and the token ids (T,) for activations (B, L, H), each None where it does not fit.

        With a KV cache the mask covers earlier positions too: the last L are taken. A part of the model for images has
        another L.

        Args:
            x: (B, L, H).
            token_ids: (B, L), if the caller passes them, as a graph does.
            mask: (B, at least L), likewise; 0 for padding.
        """
        token_ids = _fitting(self.token_ids if token_ids is None else token_ids, x)
        mask = self.mask if mask is None else mask
        mask = _fitting(mask, x) if token_ids is None else _last(mask, x)
        return None if mask is None else mask.reshape(-1) != 0, None if token_ids is None else token_ids.reshape(-1)

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "token_ids": None, "mask": None}


def exporting() -> bool:
    """Whether torch.export runs. `torch.compiler.is_exporting()` says so under torch.compile too, up to torch 2.12."""
    flag: bool = torch.compiler._is_exporting_flag
    return flag


def _fitting(values: Tensor | None, x: Tensor) -> Tensor | None:
    return _last(values, x) if isinstance(values, Tensor) and values.shape == x.shape[:-1] else None


def _last(values: Tensor | None, x: Tensor) -> Tensor | None:
    if not isinstance(values, Tensor) or values.dim() != 2 or x.dim() != 3:
        return None
    if values.shape[0] != x.shape[0] or values.shape[1] < x.shape[1]:
        return None
    return values[:, values.shape[1] - x.shape[1] :]


def takes_tokens(module: nn.Module) -> bool:
    """Whether a module's forward takes token ids and a padding mask."""
    parameters = inspect.signature(module.forward).parameters
    return all(name in parameters for name in _NAMES)


def connect(model: nn.Module, layers: Mapping[str, Any]) -> list[RemovableHandle]:
    """Give layers the `ModelInputs` of the module around them.

    Args:
        model: The model.
        layers: Layers with `model_inputs`, by their paths in it.

    Returns:
        The hooks that do it.
    """
    owners: dict[str, ModelInputs] = {}
    hooks: list[RemovableHandle] = []
    for path, layer in layers.items():
        owner = _owner(model, path)
        if owner is None:
            continue
        if owner not in owners:
            module = model.get_submodule(owner)
            owners[owner] = ModelInputs(tuple(inspect.signature(module.forward).parameters))
            hooks.append(module.register_forward_pre_hook(owners[owner], with_kwargs=True))
            hooks.append(module.register_forward_hook(owners[owner].forget))
        layer.model_inputs = owners[owner]
    return hooks


def _owner(model: nn.Module, path: str) -> str | None:
    """Return the path of the nearest module around `path` that takes tokens."""
    while path:
        path = path.rpartition(".")[0]
        if takes_tokens(model.get_submodule(path)):
            return path
    return None
