from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from moeify.measure import TOLERANCE
from moeify.passes.ffn import FFN
from moeify.passes.find_ffn import find_ffns_in
from moeify.passes.matching.region import bind, region_parameters, short_names
from tests.passes.blocks import HIDDEN, INTERMEDIATE, TOKENS, exported


class Block(nn.Module):
    """x + down(region(up_0(x), up_1(x), …)), with as many projections as `widths`."""

    def __init__(self, region: Callable[..., Tensor], *widths: int) -> None:
        super().__init__()
        self.region = region
        self.ups = nn.ModuleList(nn.Linear(HIDDEN, width) for width in widths)
        self.down = nn.Linear(INTERMEDIATE, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(self.region(*(up(x) for up in self.ups)))
        return x + down


def only(given: fx.GraphModule) -> FFN:
    (ffn,) = find_ffns_in(given).ffns
    return ffn


REGIONS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "a formula": (lambda x: x.sin() * x.clamp(-3, 3), (INTERMEDIATE,)),
    "three projections": (lambda a, b, c: F.silu(a) * b * c.sigmoid(), (INTERMEDIATE,) * 3),
    "halves": (lambda z: F.glu(z, -1), (2 * INTERMEDIATE,)),
    "halves, in a list": (
        lambda z: F.glu(z.reshape(-1, 2 * INTERMEDIATE), 1).reshape(2, TOKENS, -1),
        (2 * INTERMEDIATE,),
    ),
    "halves by a reshape": (lambda z: z.unflatten(-1, (2, -1)).unbind(-2)[0].sin(), (2 * INTERMEDIATE,)),
    "over the neurons": (lambda z: z.relu() / z.relu().sum(2, keepdim=True), (INTERMEDIATE,)),
    "a norm": (lambda z: F.layer_norm(z.relu(), (INTERMEDIATE,)), (INTERMEDIATE,)),
}


@pytest.mark.parametrize("leading", [(), (1,), (3, 7), (2, 3, 4, 5)])
@pytest.mark.parametrize(("region", "widths"), REGIONS.values(), ids=REGIONS)
def test_a_region_works_for_any_leading_shape(
    region: Callable[..., Tensor], widths: tuple[int, ...], leading: tuple[int, ...]
) -> None:
    captured = only(exported(Block(region, *widths))).region
    inputs = [torch.randn(*leading, width, dtype=torch.float64) for width in widths]
    result = captured(*inputs)
    assert result.shape == (*leading, INTERMEDIATE)
    for position in itertools.product(*(range(n) for n in leading)):
        expected = region(*(each[position].expand(2, TOKENS, -1) for each in inputs))[0, 0]
        torch.testing.assert_close(result[position], expected, rtol=TOLERANCE["float64"], atol=1e-14)


def test_dropout_and_reshapes_that_keep_the_features_are_left_out_and_casts_are_not() -> None:
    def region(z: Tensor) -> Tensor:
        z = F.dropout(z.double().reshape(-1, INTERMEDIATE), 0.5, False).contiguous().sin()
        return z.view(2, TOKENS, INTERMEDIATE).float().detach()

    nodes = only(exported(Block(region, INTERMEDIATE))).region.graph.nodes
    assert [str(node.target) for node in nodes if node.op == "call_function"] == [
        "aten.to.dtype",
        "aten.sin.default",
        "aten.to.dtype",
        "aten.detach.default",
    ]


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(())), nn.Parameter(torch.rand(INTERMEDIATE), requires_grad=False)
        self.register_buffer("c", torch.rand(INTERMEDIATE))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x.relu() + self.b * x.sin() + torch.tensor(0.5) * x.cos() * self.c  # type: ignore[operator]


def test_a_region_is_bound_to_values_of_its_own() -> None:
    ffn = only(exported(Block(Learned(), INTERMEDIATE)))
    assert region_parameters(ffn.region) == ["region.a", "region.b", "region.c"]
    values = {"region.a": torch.tensor(2.0), "region.b": torch.rand(INTERMEDIATE), "region.c": torch.rand(INTERMEDIATE)}
    bound = bind(ffn.region, values.__getitem__)
    parameters = dict(bound.named_parameters())
    assert {name: each.requires_grad for name, each in parameters.items()} == {"a": True, "b": False}
    assert torch.equal(bound.get_buffer("c"), values["region.c"])
    assert parameters["b"].data_ptr() != values["region.b"].data_ptr()
    z = torch.randn(3, INTERMEDIATE)
    expected = 2 * z.relu() + values["region.b"] * z.sin() + 0.5 * z.cos() * values["region.c"]
    torch.testing.assert_close(bound(z), expected)
    assert region_parameters(ffn.region) == ["region.a", "region.b", "region.c"]  # the captured one is left alone


NAMES: list[tuple[list[str], list[str]]] = [
    ([], []),
    (["layers.0.act.alpha", "layers.0.act.beta"], ["alpha", "beta"]),
    (["gate.alpha", "up.alpha"], ["gate_alpha", "up_alpha"]),
    (["a.x.w", "b.x.w", "v"], ["a_x_w", "b_x_w", "v"]),
    (["w", "a.w"], ["w", "a_w"]),
    (["a.b", "a_b"], ["b", "a_b"]),
]


@pytest.mark.parametrize(("names", "short"), NAMES)
def test_names_are_as_short_as_they_can_be(names: list[str], short: list[str]) -> None:
    assert short_names(names) == dict(zip(names, short, strict=True))
