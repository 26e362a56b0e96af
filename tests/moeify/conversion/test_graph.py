from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import moeify
from moeify.config import MoEConfig
from moeify.conversion.graph import convert_graph
from moeify.errors import MoeifyError, RefusedError
from moeify.layers import SparseMoE
from moeify.measure import TOLERANCE
from moeify.passes.lower import Lower
from tests.moeify import tiny

CONFIG = MoEConfig(experts=5, top_k=2)
DIFFERENT = MoEConfig(experts=6, top_k=3, granularity=3, shared_experts=1, method="noise")  # no two experts are equal
FP32 = TOLERANCE["float32"]


def exported(model: nn.Module, kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    return torch.export.export(model, (), kwargs, strict=False)


def inputs(name: str) -> dict[str, Any]:
    cached = name not in {"bert", "vit"}
    return {**tiny.inputs(name), **({"use_cache": False} if cached else {})}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, CONFIG) for name in ("phi3", "gpt2", "t5", "bert")),
        ("phi3", DIFFERENT),
        ("gpt2", DIFFERENT),
    ],
)
def test_the_graph_and_the_module_are_the_same_model(name: str, config: MoEConfig) -> None:
    model, given = tiny.build(name), inputs(name)
    dense = tiny.logits(model, name)
    graph = convert_graph(exported(model, given), config)
    result = graph(**given).logits
    assert (tiny.relative(result.detach(), dense) < FP32) == config.exact

    moeify.convert(model, config)
    assert torch.equal(result, model(**given).logits)
    ours, theirs = graph.state_dict(), model.state_dict()
    assert list(ours) == [name for name in theirs if name in ours]
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert {key for key in theirs if "experts" in key or "router" in key} <= set(ours)
    stored = {value.data_ptr() for value in theirs.values()}  # of a tied weight the graph keeps one name
    assert len({value.data_ptr() for value in ours.values()}) == len(stored)


class Positions(nn.Module):
    """Writes into a table that it makes; nothing reads what the writing returns."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 23), nn.Linear(23, 10)

    def forward(self, x: Tensor) -> Tensor:
        table = torch.arange(30.0).reshape(3, 10)
        table[1] = table[0] * 2
        y: Tensor = x + self.down(F.gelu(self.up(x + table)))
        return y


def test_what_is_written_in_place_is_kept() -> None:
    model, x = Positions().eval(), torch.randn(2, 3, 10)
    graph = convert_graph(exported(model, {"x": x}), CONFIG)
    assert tiny.relative(graph(x=x).detach(), model(x).detach()) < FP32


class Block(nn.Module):
    """Layers that cannot be replaced in the module tree: an FFN of bare parameters, and one of 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(10, 23) / 3), nn.Parameter(torch.randn(10, 23) / 5)
        self.slope = nn.Parameter(torch.rand(23))
        self.up, self.down = nn.Conv1d(10, 46, 1), nn.Conv1d(23, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.linear(torch.where((z := x @ self.w1) > 0, z.square(), self.slope * z), self.w2)
        gate, up = self.up(x.transpose(1, 2)).chunk(2, 1)
        out: Tensor = self.head(x + self.down(F.silu(gate) * up).transpose(1, 2))
        return out


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def test_ffns_that_are_no_modules(block: Block) -> None:
    x = torch.randn(2, 5, 10)
    graph = convert_graph(torch.export.export(block, (x,)), CONFIG)
    layers = {name: module for name, module in graph.named_modules() if isinstance(module, SparseMoE)}
    assert set(layers) == {"w2_moe", "down"}
    assert tiny.relative(graph(x).detach(), block(x).detach()) < FP32
    names = set(graph.state_dict())
    assert not names & {"w1", "w2", "slope", "up.weight", "down.weight", "down.bias"}
    assert {"w2_moe.experts.up_proj", "w2_moe.experts.region.slope", "down.experts.gate_up_proj_bias"} <= names


def test_nothing_of_the_given_graph_changes(block: Block) -> None:
    x = torch.randn(2, 5, 10)
    program = torch.export.export(block, (x,))
    before, text = block(x), str(program.graph)
    given = program.module(check_guards=False)
    convert_graph(given, CONFIG)
    assert torch.equal(given(x), before)
    assert str(program.graph) == text


def test_any_batch_and_length(block: Block) -> None:
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(block, (torch.randn(2, 5, 10),), dynamic_shapes=(free,))
    graph = Lower()(convert_graph(program, CONFIG)).graph_module
    x = torch.randn(3, 8, 10)
    assert tiny.relative(graph(x).detach(), block(x).detach()) < FP32


def test_graphs_of_symbolic_trace(block: Block) -> None:
    x, model = torch.randn(2, 5, 10), nn.Sequential(block)
    traced = fx.symbolic_trace(model)
    assert tiny.relative(convert_graph(traced, CONFIG, example_inputs=x)(x).detach(), model(x).detach()) < FP32
    with pytest.raises(MoeifyError, match="pass example_inputs"):
        convert_graph(traced, CONFIG)


def test_a_graph_without_ffns_is_refused() -> None:
    with pytest.raises(RefusedError, match="no dense FFN"):
        convert_graph(torch.export.export(nn.Linear(3, 3), (torch.zeros(2, 3),)), CONFIG)


def test_training_gives_the_gradients_of_the_module() -> None:
    model = tiny.build("llama")
    graph = convert_graph(exported(model, inputs("llama")), CONFIG)
    moeify.convert(model, CONFIG)
    for run in (graph, model):
        run(**inputs("llama")).logits.square().mean().backward()
    theirs = dict(model.named_parameters())
    pairs = [(p.grad, theirs[name].grad) for name, p in graph.named_parameters() if "experts" in name]
    assert len(pairs) == 2 * tiny.LAYERS
    assert all(torch.equal(ours, other) for ours, other in pairs if ours is not None and other is not None)
    assert all(ours is not None and ours.abs().sum() > 0 for ours, _ in pairs)


def test_exports_again_compiles_and_is_saved(block: Block) -> None:
    x = torch.randn(2, 5, 10)
    graph = convert_graph(torch.export.export(block, (x,)), CONFIG)
    expected = graph(x)
    again = torch.export.export(graph, (x,), strict=False)
    assert set(again.state_dict) == set(graph.state_dict())
    buffer = io.BytesIO()
    torch.export.save(again, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.export.load(buffer).module(check_guards=False)(x), expected)
    compiled = torch.compile(graph, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


def test_losses_are_returned_or_attached(block: Block) -> None:
    x, config = torch.randn(2, 5, 10), MoEConfig(experts=5, top_k=2, z_loss=0.1)
    program = torch.export.export(block, (x,))
    plain = convert_graph(program, config)
    out, loss = convert_graph(program, config, return_losses=True)(x)
    assert torch.equal(out, plain(x))
    plain(x)
    layers = [module for module in plain.modules() if isinstance(module, SparseMoE)]
    expected = sum(0.01 * layer.losses()["balance"] + 0.1 * layer.losses()["z"] for layer in layers)
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad


@pytest.mark.parametrize("implementation", ["auto", "cpu", "reference"])
def test_lowered_graphs_compute_the_same(block: Block, implementation: str) -> None:
    x = torch.randn(2, 5, 10)
    program = torch.export.export(block, (x,))
    graph, to_lower = (convert_graph(program, CONFIG, return_losses=True) for _ in range(2))
    out, loss = graph(x)
    lowered = Lower(implementation)(to_lower).graph_module
    lowered_out, lowered_loss = lowered(x)
    torch.testing.assert_close(lowered_out, out)
    torch.testing.assert_close(lowered_loss, loss)
    assert set(lowered.state_dict()) == set(graph.state_dict())
    assert not lowered.graph.find_nodes(op="call_module")
    lowered_loss.backward()


def test_lower_names_what_it_knows() -> None:
    with pytest.raises(ValueError, match="implementation is 'fast': expected one of auto"):
        Lower("fast")


class Prepared(nn.Module):
    """Weights that the forward transposes first: nodes that nothing needs once the FFN is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(23, 10) / 3), nn.Parameter(torch.randn(10, 23) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(x @ self.w1.t()) @ self.w2.t()


def test_what_prepared_the_dense_weights_goes_with_them() -> None:
    x, model = torch.randn(2, 5, 10), nn.Sequential(Prepared())
    graph = convert_graph(torch.export.export(model, (x,)), CONFIG)
    assert tiny.relative(graph(x).detach(), model(x).detach()) < FP32
    assert not any(name.endswith(("w1", "w2")) for name in graph.state_dict())


class SetApart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(10, 23), nn.GELU(), nn.Linear(23, 10))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            out: Tensor = x + self.ffn(x)
            return out


def test_ffns_in_blocks_that_export_sets_apart_are_named() -> None:
    with pytest.raises(RefusedError, match=r"^ffn: computed in a block `with torch.no_grad\(\)` or `with autocast`"):
        convert_graph(torch.export.export(SetApart(), (torch.randn(2, 5, 10),)), CONFIG)


class FirstWithoutGradients(SetApart):
    """A recurrent model that trains its last cycle only."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x + self.ffn(x)
        out: Tensor = x + self.ffn(x)
        return out


def test_an_ffn_that_is_also_called_in_such_a_block_is_named_and_converts_where_all_is_without_gradients() -> None:
    model, x = FirstWithoutGradients(), torch.randn(2, 5, 10)
    with pytest.raises(RefusedError, match=r"^ffn: computed in a block .*all under torch.no_grad\(\)"):
        convert_graph(torch.export.export(model, (x,)), CONFIG)
    with torch.no_grad():
        converted = convert_graph(torch.export.export(model, (x,)), CONFIG)
        assert tiny.relative(converted(x), model(x)) < FP32


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w1", torch.randn(23, 10))
        self.register_buffer("w2", torch.randn(10, 23))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(F.gelu(F.linear(x, self.w1)), self.w2)  # type: ignore[arg-type]


def test_weights_in_buffers_are_refused() -> None:
    with pytest.raises(RefusedError, match="w1 is a buffer, not a parameter"):
        convert_graph(torch.export.export(Frozen(), (torch.randn(2, 5, 10),)), CONFIG)


class Layers(nn.Module):
    """Two FFNs in a list: whoever calls this part adds their residual connections."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(10, 23), nn.GELU(), nn.Linear(23, 10)) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def test_residual_connections_outside_the_graph() -> None:
    model, x = Layers().eval(), torch.randn(2, 5, 10)
    graph = convert_graph(torch.export.export(model, (x,)), CONFIG)
    assert [name for name, module in graph.named_modules() if isinstance(module, SparseMoE)] == ["layers.0", "layers.1"]
    results = graph(x)
    moeify.convert(model, CONFIG, example_inputs=x)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, model(x), strict=True))
