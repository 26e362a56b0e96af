from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.moeify.checkpoint.quantized.make import Tensors, assert_reads, numbers, packed, refusal, scales, write

IN, OUT, GROUP = 64, 32, 16


def settings(bits: int, **changes: object) -> dict[str, object]:
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, **changes}


def tensors(bits: int, *, less: int = 1, shuffled: bool = False) -> tuple[Tensors, torch.Tensor]:
    """A weight with a zero point of 0 among others, and its values."""
    q, zeros = numbers(IN, OUT, below=1 << bits), numbers(IN // GROUP, OUT, below=1 << bits, seed=1)
    zeros[0, 0] = 0
    scale, order = scales(IN // GROUP, OUT, dtype=torch.float16), torch.arange(IN) // GROUP
    order = order[torch.randperm(IN, generator=torch.Generator().manual_seed(2))] if shuffled else order
    values = torch.zeros(OUT, IN, dtype=torch.float64)
    for i in range(IN):
        for o in range(OUT):
            group = int(order[i])
            values[o, i] = float(scale[group, o]) * (int(q[i, o]) - int(zeros[group, o]))
    stored: Tensors = {"qweight": packed(q, bits, 0), "scales": scale}
    stored["qzeros"] = packed((zeros - less) % (1 << bits), bits, 1)
    return stored | ({"g_idx": order.int()} if shuffled else {}), values


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
def test_integers_less_zero_points_times_scales(bits: int, shuffled: bool, tmp_path: Path) -> None:
    stored, expected = tensors(bits, shuffled=shuffled)
    assert_reads(write(tmp_path, stored, settings(bits)), expected)


def test_zero_points_of_the_second_format_are_what_they_say(tmp_path: Path) -> None:
    stored, expected = tensors(4, less=0)
    assert_reads(write(tmp_path, stored, settings(4, checkpoint_format="gptq_v2")), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 5}, "bits = 5, expected one of 2, 3, 4, 8"),
        ({"bits": "4"}, "bits = '4'"),
        ({"bits": 8}, "scales has shape [4, 32], expected [2, 32]"),
        ({"group_size": 8}, "scales has shape [4, 32], expected [8, 32]"),
        ({"group_size": 0}, "group_size = 0"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    assert words in refusal(write(tmp_path, tensors(4)[0], {**settings(4), **changes}))


def test_a_group_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for number in (-1, 4):
        stored, _ = tensors(4, shuffled=True)
        stored["g_idx"][5] = number
        assert "none of the 4" in refusal(write(tmp_path, stored, settings(4)))
