"""Which stacks hold blocks that all do the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeify.tracing.blocks import KEPT, equal_stacks, shortened

COUNT, WIDTH = 12, 6


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, width), nn.Linear(width, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.relu(self.up(x)))
        return out


class Model(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.result(x)

    def result(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


class Between(Model):  # something stands between two blocks
    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x) * (2 if number == 7 else 1)
        return self.result(x)


class Skips(Model):  # the end reads the first block, as in a U-net
    def forward(self, x: Tensor) -> Tensor:
        results = [x]
        for block in self.blocks:
            results.append(block(results[-1]))
        return self.result(results[-1] + results[1])


class Twice(Model):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x)


class All(Model):  # the result of every block is a result of the model
    def forward(self, x: Tensor) -> Any:
        results = [x]
        for block in self.blocks:
            results.append(block(results[-1]))
        return results


class Crooked(Block):
    """A block that does at one place in the stack what the others do not."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.number != 8 else x.tanh())


def equal(kind: type[Model], make: Callable[[int], nn.Module]) -> list[str]:
    model = kind([make(number) for number in range(COUNT)]).to("meta")
    stacks = equal_stacks(model, lambda: model(torch.zeros(2, 5, WIDTH, device="meta")))
    return [stack.path for stack in stacks]


def test_a_stack_of_blocks_that_do_the_same() -> None:
    assert equal(Model, lambda _: Block()) == ["blocks"]


@pytest.mark.parametrize("kind", [Between, Skips, Twice, All])
def test_what_is_done_with_blocks_counts(kind: type[Model]) -> None:
    assert equal(kind, lambda _: Block()) == []


def test_one_block_that_differs_in_what_it_does_or_in_its_size() -> None:
    assert equal(Model, Crooked) == []
    assert equal(Model, lambda number: Block(9 if number == 8 else 8)) == []


def test_blocks_that_share_weights_are_not_taken_apart() -> None:
    shared = Block()

    def make(number: int) -> nn.Module:
        block = Block()
        block.up = shared.up if number in {3, 9} else block.up
        return block

    assert equal(Model, make) == []


def test_a_short_stack_and_a_run_that_fails() -> None:
    model = Model([Block() for _ in range(4)]).to("meta")
    assert equal_stacks(model, lambda: model(torch.zeros(5, WIDTH, device="meta"))) == ()
    model = Model([Block() for _ in range(COUNT)]).to("meta")
    assert equal_stacks(model, lambda: model("no tensor")) == ()


def test_stacks_are_whole_again_after_an_error() -> None:
    model = Model([Block() for _ in range(COUNT)]).to("meta")
    stacks = equal_stacks(model, lambda: model(torch.zeros(5, WIDTH, device="meta")))
    with pytest.raises(KeyError), shortened(stacks):
        assert len(model.blocks) == KEPT
        raise KeyError
    assert len(model.blocks) == COUNT
