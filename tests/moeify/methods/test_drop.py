from __future__ import annotations

import pytest
import torch

from moeify.errors import ConfigError
from moeify.methods.drop import Drop, dropped_neurons


@pytest.mark.parametrize("axis", [0, 1])
def test_dropped_neurons_are_drawn_from_what_they_replace_and_the_others_stay(axis: int) -> None:
    weight = 3 + 0.5 * torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    neurons = dropped_neurons(100, 0.3, 1, "experts.0.neurons")
    assert len(set(neurons.tolist())) == 30
    with torch.device("meta"):
        assert dropped_neurons(100, 0.3, 1, "experts.0.neurons").equal(neurons)
    new = Drop(share=0.3).changed(weight, axis, 1, "experts.0", "down")
    kept = torch.ones(100, dtype=torch.bool)
    kept[neurons] = False
    kept_indices = kept.nonzero()[:, 0]
    assert new.index_select(axis, kept_indices).equal(weight.index_select(axis, kept_indices))
    drawn = new.index_select(axis, neurons)
    assert (drawn != weight.index_select(axis, neurons)).all()
    assert float(drawn.mean()) == pytest.approx(3, abs=0.05) and float(drawn.std()) == pytest.approx(0.5, abs=0.03)
    assert Drop(share=0.0).changed(weight, axis, 1, "experts.0", "down") is weight


def test_an_expert_loses_the_same_neurons_in_all_its_projections() -> None:
    up, down, drop = torch.arange(40.0).reshape(10, 4), torch.arange(40.0).reshape(4, 10), Drop(share=0.5)

    def lost(expert: str) -> torch.Tensor:
        gate, value = ((drop.changed(up, 0, 0, expert, which) != up).all(1) for which in ("up0", "up1"))
        assert gate.equal(value) and gate.equal((drop.changed(down, 1, 0, expert, "down") != down).all(0))
        assert gate.sum() == 5
        return gate

    assert not lost("experts.0").equal(lost("experts.1"))
    assert not drop.changed(up, 0, 0, "experts.0", "up0").equal(drop.changed(up, 0, 0, "experts.0", "up1"))


def test_facts_and_options() -> None:
    assert not Drop.exact
    assert Drop().to_dict() == {"name": "drop", "share": 0.5}
    with pytest.raises(ConfigError, match=r"method\.share is -0\.1: expected a number from 0 to 1"):
        Drop(share=-0.1)
