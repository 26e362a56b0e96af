from __future__ import annotations

import pytest
from torch import nn

from sweeps.count_by_name import by_name


class Block(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ({"fc1": nn.Linear(4, 9), "fc2": nn.Linear(9, 4)}, {"mlp.fc2.weight": (4, 9)}),
        ({"gate_up_proj": nn.Linear(4, 18), "down_proj": nn.Linear(9, 4)}, {"mlp.down_proj.weight": (4, 9)}),
        ({"fc1": nn.Linear(4, 9), "fc2": nn.Linear(9, 5)}, {}),
        ({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(9, 4)}, {}),
        ({"fc2": nn.Linear(9, 4)}, {}),
        ({"pwconv1": nn.Conv2d(4, 9, 1), "pwconv2": nn.Conv2d(9, 4, 1)}, {"mlp.pwconv2.weight": (4, 9)}),
        ({"pwconv1": nn.Conv2d(4, 9, 3), "pwconv2": nn.Conv2d(9, 4, 3)}, {}),
    ],
)
def test_names_and_shapes_make_an_ffn(layers: dict[str, nn.Module], found: dict[str, tuple[int, int]]) -> None:
    assert by_name(Block(mlp=Block(**layers)), [], []) == found


def test_what_was_looked_up_overrides_names() -> None:
    model = Block(projector=Block(fc1=nn.Linear(4, 9), fc2=nn.Linear(9, 4)), mlp=Block(strange=nn.Linear(9, 4)))
    assert by_name(model, [], []) == {}
    assert by_name(model, [r"strange"], []) == {"mlp.strange.weight": (4, 9)}
    assert by_name(model, [r"projector.*fc2", r"strange"], [r"strange"]) == {"projector.fc2.weight": (4, 9)}
