from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.errors import RefusedError
from moeify.passes.base import PassResult
from moeify.passes.find_ffn import FindFFN, find_ffns_in, findings
from moeify.tracing.trace import trace
from tests.moeify import tiny
from tests.passes.blocks import HIDDEN, INTERMEDIATE, TOKENS, Mlp, Model, find, only_reason, residual, snapshot, twice

# The architectures of `tiny`: how many, kind, activation, and where gate and up rows lie (projection, start, stop).
Rows = tuple[int, int, int]
ARCHITECTURES: dict[str, tuple[int, str, str, Rows | None, Rows]] = {
    "llama": (3, "glu", "silu", (0, 0, 57), (1, 0, 57)),
    "mistral": (3, "glu", "silu", (0, 0, 57), (1, 0, 57)),
    "qwen2": (3, "glu", "silu", (0, 0, 57), (1, 0, 57)),
    "qwen3": (3, "glu", "silu", (0, 0, 57), (1, 0, 57)),
    "gemma": (3, "glu", "gelu_tanh", (0, 0, 57), (1, 0, 57)),
    "phi3": (3, "glu", "silu", (0, 0, 57), (0, 57, 114)),
    "gpt2": (3, "mlp", "gelu_tanh", None, (0, 0, 57)),
    "opt": (3, "mlp", "relu", None, (0, 0, 57)),
    "gpt_neox": (3, "mlp", "gelu", None, (0, 0, 57)),
    "t5": (3, "mlp", "relu", None, (0, 0, 57)),
    "t5_gated": (3, "glu", "gelu_tanh", (0, 0, 57), (1, 0, 57)),
    "bert": (3, "mlp", "gelu", None, (0, 0, 57)),
    "vit": (3, "mlp", "gelu", None, (0, 0, 57)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_architectures(name: str) -> None:
    count, kind, activation, gate, up = ARCHITECTURES[name]
    found = find_ffns_in(trace(tiny.build(name)))
    assert len(found.ffns) == count
    for ffn in found.ffns:
        assert (ffn.kind, ffn.activation) == (kind, activation)
        assert (ffn.hidden, ffn.intermediate) == (tiny.HIDDEN, tiny.INTERMEDIATE)
        assert ffn.gate_up_rows is not None
        assert (ffn.gate_up_rows.gate and ffn.gate_up_rows.gate[:3]) == gate
        assert ffn.gate_up_rows.up[:3] == up
        assert len(ffn.calls) == 1 and not ffn.shared_expert
    assert len({ffn.down.weight for ffn in found.ffns}) == count


def test_a_refusal_names_the_node_and_the_module_at_which_the_match_stopped() -> None:
    found = find(Model(lambda m, x: x + m.mlps[0](m.norm(x)).tanh(), Mlp()))
    (refusal,) = [refusal for refusal in found.refused if refusal.name == "mlps.0.down"]
    assert (refusal.name, refusal.where) == ("mlps.0.down", "mlps.0.down")
    assert refusal.node.startswith("linear")


class ConvMlp(nn.Module):
    """1x1 convolutions over an image, after a depthwise convolution (as ConvNeXt and PoolFormer write it)."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        self.mix = nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN)
        self.up = nn.Conv2d(HIDDEN, INTERMEDIATE * (1 + gated), 1)
        self.down = nn.Conv2d(INTERMEDIATE, HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.up(self.mix(x))
        gate, up = z.chunk(2, 1) if self.gated else (z, 1)
        out: Tensor = x + self.down(F.silu(gate) * up)
        return out


@pytest.mark.parametrize("gated", [False, True])
def test_1x1_convolutions_are_projections_of_channels(gated: bool) -> None:
    (ffn,) = find(ConvMlp(gated), 2, HIDDEN, 6, 7).ffns
    assert (ffn.kind, ffn.activation, ffn.intermediate) == ("glu" if gated else "mlp", "silu", INTERMEDIATE)
    assert ffn.down.axis == -3
    z = torch.randn(3, 4, INTERMEDIATE * (1 + gated))  # the region takes features in the last dimension
    expected = F.silu(z[..., :INTERMEDIATE]) * (z[..., INTERMEDIATE:] if gated else 1)
    torch.testing.assert_close(ffn.region(z), expected)


class Functional(nn.Module):
    """Weights held as bare parameters, products written out."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.zeros(HIDDEN, INTERMEDIATE)), nn.Parameter(torch.zeros(INTERMEDIATE))
        self.w2 = nn.Parameter(torch.zeros(HIDDEN, INTERMEDIATE))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear((x @ self.w1 + self.b1).relu(), self.w2)


def test_bare_parameters() -> None:
    (ffn,) = find(Functional()).ffns
    assert ffn.parameters == ("w1", "b1", "w2")
    assert (ffn.ups[0].transposed, ffn.down.transposed, ffn.activation) == (True, False, "relu")


def test_layers_that_share_an_ffn_have_one_that_is_called_often() -> None:
    (ffn,) = find(Model(twice, Mlp())).ffns
    assert len(ffn.calls) == 2


def test_a_weight_that_something_else_uses_is_left_alone() -> None:
    found = find(Model(lambda m, x: x + m.mlps[0](x) + F.linear(m.other(x), m.mlps[0].down.weight.t()).sum(), Mlp()))
    assert found.ffns == ()
    assert "its weight mlps.0.down.weight is also used elsewhere" in {refusal.reason for refusal in found.refused}


def test_calls_that_compute_something_else_with_the_same_weights_are_no_calls_of_one_ffn() -> None:
    def both(second: Callable[[Tensor], Tensor]) -> Model:
        def run(m: Model, x: Tensor) -> Tensor:
            x = x + m.mlps[0].down(F.relu(m.mlps[0].up(x)))
            out: Tensor = x + m.mlps[0].down(second(m.mlps[0].up(x)))
            return out

        return Model(run, Mlp())

    assert [len(ffn.calls) for ffn in find(both(F.relu)).ffns] == [2]
    found = find(both(F.gelu))
    assert found.ffns == ()
    assert only_reason(found, "mlps.0.down") == "its weight mlps.0.up.weight is also used elsewhere"
    assert find(both(lambda z: z.relu().sin())).ffns == ()


def test_calls_of_a_custom_activation_are_told_apart_by_what_it_computes() -> None:
    def both(first: float, second: float) -> Model:
        def run(m: Model, x: Tensor) -> Tensor:
            for slope in (first, second):
                x = x + m.mlps[0].down((slope * m.mlps[0].up(x)).sin())
            return x

        return Model(run, Mlp())

    assert [len(ffn.calls) for ffn in find(both(0.5, 0.5)).ffns] == [2]
    assert find(both(0.5, 0.7)).ffns == ()


class Layers(nn.Module):
    """FFNs whose residual connections are made by whoever calls."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(count))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def test_a_lone_mlp_is_refused_and_a_stack_of_layers_is_not() -> None:
    reason = "no residual connection was seen around it, and it is the only one of its kind"
    assert only_reason(find(Layers(1)), "layers.0.down") == reason
    assert only_reason(find(Mlp()), "down") == reason
    assert [ffn.name for ffn in find(Layers(2)).ffns] == ["layers.0", "layers.1"]


def test_the_graph_is_not_changed_and_the_findings_are_kept() -> None:
    gm = trace(residual(), torch.zeros(2, TOKENS, HIDDEN))
    before = snapshot(gm)
    assert FindFFN()(gm) == PassResult(gm, modified=False)
    assert snapshot(gm) == {**before, "meta": [*gm.meta]}
    assert [ffn.name for ffn in findings(gm).ffns] == ["mlps.0"]
    assert find_ffns_in(gm) == findings(gm)


def test_a_search_of_a_copy_leaves_what_was_found_in_the_original() -> None:
    gm = trace(residual(), torch.zeros(2, TOKENS, HIDDEN))
    found = find_ffns_in(gm)
    other = trace(residual(Mlp(), Mlp()), torch.zeros(2, TOKENS, HIDDEN))
    other.meta.update(gm.meta)  # as copy.deepcopy hands it on
    assert len(find_ffns_in(other).ffns) == 2
    assert findings(gm) == found


def test_there_are_no_findings_before_a_search() -> None:
    with pytest.raises(RefusedError, match="the graph was not searched for FFNs, or changed since: run FindFFN first"):
        findings(trace(residual(), torch.zeros(2, TOKENS, HIDDEN)))


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_layers_of_torch(layer: Callable[..., nn.Module], norm_first: bool) -> None:
    module = layer(HIDDEN, 2, INTERMEDIATE, batch_first=True, norm_first=norm_first, activation="gelu")
    x = torch.zeros(2, TOKENS, HIDDEN)
    found = find_ffns_in(trace(module, (x,) if isinstance(module, nn.TransformerEncoderLayer) else (x, x)))
    assert [(ffn.activation, ffn.down.weight) for ffn in found.ffns] == [("gelu", "linear2.weight")]


def test_blocks_without_gradients_and_with_autocast_are_looked_into() -> None:
    def guarded(m: Model, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x + m.mlps[0](x)
        with torch.autocast("cpu", enabled=False):
            out: Tensor = x + m.mlps[1](x)
        return out

    assert [ffn.name for ffn in find(Model(guarded, Mlp(), Mlp())).ffns] == ["mlps.0", "mlps.1"]


def test_under_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    found = find(Model(lambda m, x: x + checkpoint(m.mlps[0], m.norm(x), use_reentrant=False), Mlp()))
    assert [ffn.name for ffn in found.ffns] == ["mlps.0"]
