from __future__ import annotations

import pytest
import torch

from moeify.errors import ConfigError
from moeify.methods.noise import Noise


def test_noise_changes_a_share_by_the_standard_deviation() -> None:
    weight, noise = torch.ones(300, 200), Noise(share=0.25, std=0.02)
    first = noise.changed(weight, 0, 1, "experts.0", "up0")
    touched = (first - weight)[first != weight]
    assert touched.numel() / weight.numel() == pytest.approx(0.25, abs=0.01)
    assert float(touched.std()) == pytest.approx(0.02, rel=0.02) and abs(float(touched.mean())) < 1e-3
    assert noise.changed(weight, 0, 1, "experts.0", "up0").equal(first)
    assert not noise.changed(weight, 0, 1, "experts.1", "up0").equal(first)
    assert not noise.changed(weight, 0, 1, "experts.0", "down").equal(first)
    assert not noise.changed(weight, 0, 2, "experts.0", "up0").equal(first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_stays_and_no_share_is_no_change(dtype: torch.dtype) -> None:
    weight = torch.ones(30, 20, dtype=dtype)
    assert Noise().changed(weight, 0, 1, "experts.0", "up0").dtype == dtype
    assert Noise(share=0.0).changed(weight, 0, 1, "experts.0", "up0").equal(weight)


def test_facts_and_options() -> None:
    assert not Noise.exact
    assert Noise().to_dict() == {"name": "noise", "share": 0.5, "std": 0.02}
    with pytest.raises(ConfigError, match=r"method\.share is 1\.5: expected a number from 0 to 1"):
        Noise(share=1.5)
    with pytest.raises(ConfigError, match=r"method\.std is -1: expected a number that is not negative"):
        Noise(std=-1)
