from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from moeify.tracing.graphs import TracedPart, inline_blocks, join_path, name_by_first_path, union


class Blocks(nn.Module):
    """A block in a block."""

    def __init__(self, cast: bool) -> None:
        super().__init__()
        self.linear, self.cast = nn.Linear(3, 3), cast

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.linear(x)
            if self.cast:
                with torch.autocast("cpu", torch.bfloat16):
                    scale = scale * self.linear(x)
            shift = scale.relu()
        out: Tensor = x * scale + shift
        return out


def exported(module: nn.Module, x: Tensor) -> fx.GraphModule:
    return torch.export.export(module, (x,), strict=False).module(check_guards=False)


def called(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]


def test_a_path_in_a_path() -> None:
    assert join_path("a", "b.c") == "a.b.c"
    assert join_path("", "b") == join_path("b", "") == "b"


def test_a_block_without_gradients_is_put_where_it_is_called() -> None:
    model, x = Blocks(cast=False), torch.randn(2, 3)
    graph_module = exported(model, x)
    assert "wrap_with_set_grad_enabled" in called(graph_module)
    inlined = inline_blocks(graph_module)
    assert called(inlined) == ["aten.linear.default", "aten.relu.default", "aten.mul.Tensor", "aten.add.Tensor"]
    torch.testing.assert_close(inlined(x), model(x))


def test_a_block_in_a_block_keeps_the_names_of_its_parameters() -> None:
    inlined = inline_blocks(exported(Blocks(cast=True), torch.randn(2, 3)))
    assert not [name for name in called(inlined) if "wrap_with" in name]
    assert called(inlined).count("aten.linear.default") == 2
    linears = inlined.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    weights = {node.args[1] for node in linears}
    assert {getattr(weight, "target", None) for weight in weights} == {"linear.weight"}


def test_a_graph_without_blocks_is_left_alone() -> None:
    graph_module = exported(nn.Linear(3, 3), torch.randn(2, 3))
    code = graph_module.code
    assert inline_blocks(graph_module) is graph_module and graph_module.code == code


def test_graphs_side_by_side_are_named_from_the_root_and_share_parameters() -> None:
    x = torch.randn(2, 3)
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    parts = [TracedPart("a", exported(first, x)), TracedPart("b.c", exported(second, x))]
    whole = union(parts, {"b.c.weight": "a.weight"})
    assert {name for name, _ in whole.named_parameters()} == {"a.weight", "a.bias", "b.c.bias"}
    placeholders = [str(node.target) for node in whole.graph.find_nodes(op="placeholder")]
    assert placeholders == ["part0_input", "part1_input"]
    for (result,), expected in zip(whole(x, 2 * x), (first(x), second(2 * x)), strict=True):
        torch.testing.assert_close(result, expected)
    linears = whole.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    for node, path in zip(linears, ("a", "b.c"), strict=True):
        assert [inside for inside, _ in node.meta["nn_module_stack"].values()] == ["", path]


def test_a_module_under_several_paths_is_named_by_the_first() -> None:
    model = nn.ModuleDict({"first": nn.Linear(3, 3)})
    model["second"] = model["first"]
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["nn_module_stack"] = {"a": ("", "Root"), "b": ("second@1", "Linear"), "c": ("other", "Linear")}
    graph.output(node)
    name_by_first_path(fx.GraphModule({}, graph), model)
    assert node.meta["nn_module_stack"] == {"a": ("", "Root"), "b": ("first@1", "Linear"), "c": ("other", "Linear")}
