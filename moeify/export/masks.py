"""Padding masks that broadcast: transformers gathers them by index, which CUDA graphs cannot replay in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import masking_utils

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@contextmanager
def broadcast_padding() -> Iterator[None]:
    """Inside the block transformers reads a padding mask by broadcasting, where it would index all of it."""
    module: Any = masking_utils
    indexed = module.padding_mask_function

    def padding_mask_function(padding_mask: Tensor) -> MaskFunction:
        by_index: MaskFunction = indexed(padding_mask)

        def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            whole = batch.dim() == 4 and padding_mask.shape[-1] == key.shape[-1]
            return padding_mask[:, None, None, :] if whole else by_index(batch, head, query, key)

        return mask

    module.padding_mask_function = padding_mask_function
    try:
        yield
    finally:
        module.padding_mask_function = indexed
