"""The operators inside everything that captures, transforms or replays a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moeify.kernels.ops import experts, grouped_linear
from moeify.measure import TOLERANCE, relative_difference, tolerance_of
from tests.kernels import oracle
from tests.kernels.quantizing import to_int4


class Experts(nn.Module):
    up: Tensor
    down: Tensor
    up_bias: Tensor
    down_bias: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        inputs = oracle.make_inputs(1, 2, 12, 10, 4, gated=True, bias=True, dtype=dtype)
        for name in ("up", "down", "up_bias", "down_bias"):
            self.register_parameter(name, nn.Parameter(inputs[name]))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return experts(x, ids, weights, self.up, self.down, self.up_bias, self.down_bias, activation="silu", gated=True)


def arguments(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    inputs = oracle.make_inputs(tokens, 2, 12, 10, 4, gated=True, bias=True, dtype=dtype, seed=tokens)
    return inputs["x"], inputs["ids"], inputs["weights"]


def loss_and_gradients(model: Any, x: Tensor, ids: Tensor, weights: Tensor) -> list[Tensor]:
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = model(x, ids, weights)
    return [out, *torch.autograd.grad(out.square().sum(), [x, weights, *model.parameters()])]


def test_opcheck() -> None:
    inputs = oracle.cast(oracle.make_inputs(5, 2, 6, 7, 3, gated=True, bias=True), torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.moeify.experts.default, (*inputs.values(), "silu", True, "auto"), test_utils=tests)
    offsets = torch.tensor([0, 1, 3, 4], dtype=torch.int32)
    args = (inputs["x"], inputs["up"], inputs["up_bias"], offsets, "auto")
    torch.library.opcheck(torch.ops.moeify.grouped_linear.default, args, test_utils=tests)
    plain = oracle.make_inputs(5, 2, 32, 32, 3, gated=False, bias=True, dtype=torch.float32)
    up, down = to_int4(plain["up"], 32), to_int4(plain["down"], 32)
    plain |= {"up": up.values, "down": down.values}
    args = (*plain.values(), "silu", False, up.scales, down.scales, "auto")
    torch.library.opcheck(torch.ops.moeify.quantized_experts.default, args, test_utils=tests[:2])


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
@pytest.mark.parametrize("strict", [True, False])
def test_export_shows_one_node_and_any_number_of_tokens(strict: bool) -> None:
    model, tokens = Experts(), torch.export.Dim("tokens", min=2, max=1000)
    program = torch.export.export(model, arguments(7), dynamic_shapes=[{0: tokens}] * 3, strict=strict)
    for captured in (program, program.run_decompositions()):
        targets = [str(node.target) for node in captured.graph.nodes if "moeify" in str(node.target)]
        assert targets == ["moeify.experts.default"]
        for count in (2, 7, 33):
            torch.testing.assert_close(captured.module()(*arguments(count)), model(*arguments(count)))


def test_export_on_the_meta_device() -> None:
    program = torch.export.export(Experts().to("meta"), tuple(t.to("meta") for t in arguments(7)))
    assert "moeify.experts.default" in str(program.graph)
    out = Experts().to("meta")(*(t.to("meta") for t in arguments(3)))
    assert out.device.type == "meta" and out.shape == (3, 12)


@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_fullgraph_forward_and_backward(dynamic: bool) -> None:
    model = Experts()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for count in (4, 9):
        for a, b in zip(
            loss_and_gradients(compiled, *arguments(count)), loss_and_gradients(model, *arguments(count)), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_low_and_returns_high(dtype: torch.dtype) -> None:
    model, args = Experts(), arguments(6)
    with torch.autocast("cpu", dtype=dtype):
        results = loss_and_gradients(model, *args)
    low = Experts().to(dtype)
    expected = low(args[0].to(dtype), args[1], args[2])
    assert {t.dtype for t in results} == {torch.float32}
    assert torch.equal(results[0], expected.float())
    tolerance = 5 * tolerance_of(dtype)  # of a chain of products, against float32
    for a, b in zip(results, loss_and_gradients(model, *args), strict=True):
        assert 0 < relative_difference(a, b) < tolerance


def test_autocast_leaves_float64_alone() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = Experts(torch.float64)(*arguments(3, torch.float64))
    assert torch.equal(out, Experts(torch.float64)(*arguments(3, torch.float64)))


def test_grouped_linear_under_autocast_returns_its_dtype() -> None:
    offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grouped_linear(torch.randn(3, 4), torch.randn(2, 5, 4), None, offsets).dtype == torch.bfloat16


def test_functional_call() -> None:
    model, args = Experts(), arguments(5)
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, doubled, args)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert torch.equal(out, model(*args))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    class Checkpointed(Experts):
        def forward(self, *args: Tensor) -> Tensor:
            out: Tensor = checkpoint(super().forward, *args, use_reentrant=reentrant)
            return out

    if reentrant:  # torch.autograd.grad refuses it
        model, (x, ids, weights) = Checkpointed(), arguments(5)
        model(x.requires_grad_(), ids, weights).square().sum().backward()
        got = [torch.zeros(0) if p.grad is None else p.grad for p in model.parameters()]
    else:
        got = loss_and_gradients(Checkpointed(), *arguments(5))[3:]
    for a, b in zip(got, loss_and_gradients(Experts(), *arguments(5))[3:], strict=True):
        assert torch.equal(a, b)


def test_one_layer_used_twice() -> None:
    model, (x, ids, weights) = Experts(), arguments(5)
    out = model(model(x, ids, weights), ids.flip(0), weights)
    exact = Experts(torch.float64)
    p = exact.up, exact.down, exact.up_bias, exact.down_bias
    names = ("x", "ids", "weights", "up", "down", "up_bias", "down_bias")
    once = oracle.experts(dict(zip(names, (x.double(), ids, weights.double(), *p), strict=True)), "silu", True)
    twice = oracle.experts(dict(zip(names, (once, ids.flip(0), weights.double(), *p), strict=True)), "silu", True)
    assert relative_difference(out, twice) < TOLERANCE["float32"]
    got = dict(
        zip(
            [n for n, _ in model.named_parameters()], torch.autograd.grad(out.sum(), [*model.parameters()]), strict=True
        )
    )
    want = dict(
        zip(
            [n for n, _ in exact.named_parameters()],
            torch.autograd.grad(twice.sum(), [*exact.parameters()]),
            strict=True,
        )
    )
    for name in want:
        assert relative_difference(got[name], want[name]) < TOLERANCE["float32"]


def test_backward_twice_needs_retain_graph_and_accumulates() -> None:
    model: Any = Experts()
    out = model(*arguments(5))
    out.sum().backward(retain_graph=True)
    first = model.up.grad.clone()
    out.sum().backward()
    assert torch.equal(model.up.grad, 2 * first)
