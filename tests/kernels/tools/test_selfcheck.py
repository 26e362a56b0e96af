from __future__ import annotations

from typing import Any

import pytest
import torch

from moeify.kernels import ops
from moeify.kernels.gpu.tiles import HEIGHTS, row_tile
from moeify.kernels.tools import selfcheck
from moeify.measure import TOLERANCE, relative_difference

CPU = torch.device("cpu")


def test_every_check_passes_on_the_cpu() -> None:
    checks = list(selfcheck.self_check(CPU, torch.float32, relative_difference))
    assert len({check.name for check in checks}) == len(checks) == len(selfcheck.CASES) * (1 + 6 + 1) + 1
    for check in checks:
        assert check.difference <= TOLERANCE["float32"], check


def test_every_height_of_a_tile_and_ids_outside_are_among_the_cases() -> None:
    assert {row_tile(case.tokens * case.top_k, case.experts) for case in selfcheck.CASES} == set(HEIGHTS)
    for case in selfcheck.CASES[1:]:
        ids = selfcheck.make_inputs(case, torch.float32, CPU).expert_ids_TK
        assert (int(ids.min()), int(ids.max())) == (-1, case.experts)


@pytest.mark.parametrize("activation", ["relu2", "gelu"])
def test_other_activations_and_no_gate_are_checked(activation: str) -> None:
    case = selfcheck.Case(9, 2, 4, 12, 10, activation, gated=False)
    for check in selfcheck.check_experts(case, torch.float64, CPU, relative_difference):
        assert check.difference <= TOLERANCE["float64"] and f"{activation}, no gate" in check.name


def test_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(**kwargs: Any) -> torch.Tensor:
        out = ops.experts(**kwargs)
        return out if kwargs["implementation"] == "reference" else out * (1 + next(scales))

    scales = iter([0.1, 0.2])
    monkeypatch.setattr(selfcheck, "experts", off)
    found = list(selfcheck.check_experts(selfcheck.CASES[1], torch.float32, CPU, relative_difference))
    assert all(check.difference == pytest.approx(0.1, rel=0.01) for check in found[:-1])
    assert found[-1].difference == torch.inf, "two runs gave other bits"


def test_the_first_kernel_that_is_wrong_in_a_case_is_suspected() -> None:
    name = "experts 8x2: {}".format
    assert selfcheck.suspects([name("gradient of up_EJH"), name("output"), name("gradient of x_TH")]) == ["up or rows"]
    later = [name("gradient of up_EJH"), name("gradient of weights_TK"), "sdd", "experts 9x1: gradient of up_bias_EJ"]
    assert selfcheck.suspects(later) == ["bias", "down_backward", "sdd"]
    assert selfcheck.suspects([name("run twice")]) == ["one without fixed results"]
