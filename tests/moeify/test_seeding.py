from __future__ import annotations

import pytest
import torch

from moeify.seeding import generator, normal


def test_the_numbers_are_the_same_for_ever() -> None:
    """Checkpoints that were converted with a seed can be made again."""
    expected = torch.tensor([1.5752671246962424, -0.7719164605823363, -0.6485594453844041], dtype=torch.float64)
    torch.testing.assert_close(normal((3,), 0, "model.layers.0.mlp"), expected, rtol=0, atol=1e-15)
    assert torch.randint(1000, (3,), generator=generator(7, "x")).tolist() == [445, 13, 202]


@pytest.mark.parametrize("other", [(1, "a"), (0, "b"), (0, "")])
def test_seed_and_name_both_count(other: tuple[int, str]) -> None:
    assert not torch.equal(normal((4,), *other), normal((4,), 0, "a"))


def test_nothing_else_counts_and_nothing_else_is_touched() -> None:
    first = normal((4,), 0, "a")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(normal((4,), 0, "a"), first)
    with torch.device("meta"):
        assert torch.equal(normal((4,), 0, "a"), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert normal((2, 0), 0, "a").shape == (2, 0)
