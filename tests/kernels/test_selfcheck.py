from __future__ import annotations

import torch

from moeify.kernels import selfcheck
from moeify.measure import TOLERANCE


def test_every_check_passes_on_the_cpu() -> None:
    checks = list(selfcheck.self_check(torch.device("cpu"), torch.float32))
    assert len(checks) == 4 * 8 + 1
    for check in checks:
        assert check.difference <= TOLERANCE["float32"], check


def test_a_wrong_result_is_seen() -> None:
    assert selfcheck._difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1])) > 0.04
