from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from moeify.kernels.pages import AVAILABLE, Pages

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs pages of the system")
SHAPE = (3, 1000)


def test_what_was_freed_is_used_again_and_what_is_alive_is_not() -> None:
    pages = Pages()
    first, second = (pages.tensor(SHAPE, torch.float32).fill_(value) for value in (1, 2))
    assert first.sum() == 3000 and second.sum() == 6000
    place, view = first.data_ptr(), first[1]
    del first
    assert pages.tensor(SHAPE, torch.float32).data_ptr() != place, "a view keeps the memory"
    del view
    third = pages.tensor(SHAPE, torch.float32)
    assert third.data_ptr() == place and second.sum() == 6000


def test_the_same_size_in_another_dtype_and_shape() -> None:
    pages = Pages()
    first = pages.tensor((8, 4), torch.float64)
    place = first.data_ptr()
    del first
    again = pages.tensor((16, 8), torch.bfloat16)
    assert again.data_ptr() == place and again.shape == (16, 8) and again.dtype == torch.bfloat16


def test_a_new_size_ends_what_is_held_of_others() -> None:
    pages = Pages()
    for size in (10, 20, 30):
        pages.tensor((size,), torch.float32)
    assert {size: len(held) for size, held in pages._free.items()} == {120: 1}


def test_nothing_is_taken_back_at_the_end_of_the_process_from_a_tensor_that_is_alive() -> None:
    pages = Pages()
    out = pages.tensor(SHAPE, torch.float32)
    registry: Any = weakref.finalize.__dict__["_registry"]
    (watcher,) = [one for one in registry if one.peek() and one.peek()[1] == pages._take_back]
    assert not watcher.atexit and out.shape == SHAPE
