"""What holds for every test of a kernel: memory that nobody has written holds no number."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

# Triton decides when a kernel is decorated whether it is interpreted or compiled: interpreted tests need a process of
# their own, started with TRITON_INTERPRET=1.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["gpu"]


@pytest.fixture(autouse=True)
def memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh tensors with NaN, and integers with their largest: a result that is not written shows, or crashes."""

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: object, **kwargs: object) -> Tensor:
            fresh = allocate(*args, **kwargs)
            if fresh.is_floating_point():
                return fresh.detach().fill_(torch.nan).requires_grad_(fresh.requires_grad)
            return fresh if fresh.dtype == torch.bool else fresh.fill_(torch.iinfo(fresh.dtype).max)

        return run

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
