from __future__ import annotations

import itertools
import random

import pytest

from moeify.names import fold, folded, left_out, quantity, short_names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["lm_head"], ["lm_head"]),
        (["h.0.mlp", "h.1.mlp", "h.2.mlp"], ["h.{0..2}.mlp"]),
        (["h.0.mlp"], ["h.0.mlp"]),
        (["h.8.mlp", "h.9.mlp", "h.10.mlp"], ["h.{8..10}.mlp"]),
        (["h.0.mlp", "h.2.mlp", "h.4.mlp"], ["h.{0..4..2}.mlp"]),
        (["h.0.mlp", "h.3.mlp"], ["h.{0,3}.mlp"]),
        (["h.0.a", "h.2.a", "h.3.a", "h.4.a"], ["h.{0,2..4}.a"]),
        (["h.0.a", "h.0.b", "h.1.a", "h.1.b"], ["h.{0..1}.a", "h.{0..1}.b"]),
        (["s.0.h.0", "s.0.h.1", "s.1.h.0", "s.1.h.1"], ["s.{0..1}.h.{0..1}"]),
        (["s.0.h.0", "s.1.h.0", "s.1.h.1"], ["s.0.h.0", "s.1.h.{0..1}"]),
        (["fc1", "fc2", "h.0", "h.1", "0", "1"], ["fc1", "fc2", "h.{0..1}", "{0..1}"]),
        (["h.0", "h.0"], ["h.0"]),
        (["h.0.mlp", "h.1"], ["h.0.mlp", "h.1"]),
    ],
)
def test_repeated_layers_are_one_name(names: list[str], expected: list[str]) -> None:
    assert fold(names) == expected
    assert folded(names) == ", ".join(expected)


def spread(name: str) -> list[str]:
    """What a shell makes of braces."""
    head, brace, rest = name.partition("{")
    if not brace:
        return [name]
    inside, _, tail = rest.partition("}")
    numbers: list[int] = []
    for part in inside.split(","):
        bounds = [int(number) for number in part.split("..")]
        numbers += range(bounds[0], bounds[1] + 1, *bounds[2:]) if len(bounds) > 1 else bounds
    return [one for number in numbers for one in spread(f"{head}{number}{tail}")]


def test_nothing_is_lost_and_nothing_added() -> None:
    rng = random.Random(0)
    every = [f"a.{i}.b.{j}.{leaf}" for i, j, leaf in itertools.product(range(5), range(4), "xy")]
    for _ in range(50):
        names = rng.sample(every, rng.randrange(1, len(every)))
        assert sorted(itertools.chain.from_iterable(map(spread, fold(names)))) == sorted(names)


def test_what_is_left_out_is_one_line() -> None:
    assert left_out(["h.0.bias"]) == "note: the dense model has no place for h.0.bias; it is left out"
    names = [f"h.{i}.attn.{leaf}" for i in range(12) for leaf in ("bias", "masked_bias")]
    which = "24 tensors (h.{0..11}.attn.bias, h.{0..11}.attn.masked_bias)"
    assert left_out(names) == f"note: the dense model has no place for {which}; they are left out"


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["model.layers.0.mlp", "model.layers.12.mlp"], ["0", "12"]),
        (["encoder.block.1.mlp", "decoder.block.1.mlp"], ["encoder 1", "decoder 1"]),
        (["layers.0.moe", "layers.0.attention.moe"], ["layers.0.moe", "layers.0.attention.moe"]),
        (["mlp", "layers.0.mlp"], ["mlp", "layers.0.mlp"]),
        ([""], ["the model itself"]),
    ],
)
def test_layers_are_called_by_their_numbers_where_these_tell_them_apart(paths: list[str], expected: list[str]) -> None:
    assert short_names(paths) == expected


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [(0, "", "0"), (999, "B", "999 B"), (134_515_008, "", "134.5M"), (692e9, "", "692.0B"), (2.77e9, "B", "2.8 GB")],
)
def test_quantities_are_short(number: float, unit: str, text: str) -> None:
    assert quantity(number, unit) == text
