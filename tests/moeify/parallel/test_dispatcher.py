"""Experts on several ranks against experts on one: the same rows, in the same order, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeify import routers
from moeify.config import MoEConfig
from moeify.errors import MoeifyError
from moeify.layers.dispatch import Dispatcher, LocalDispatcher
from moeify.layers.experts import Experts
from moeify.measure import TOLERANCE
from moeify.parallel.costs import Layer, Setup
from moeify.parallel.dispatcher import ExpertParallel
from moeify.parallel.estimate import estimate, exchanged_bytes, kept_bytes
from moeify.parallel.exchange import Link
from moeify.routing.record import Routing
from tests.moeify.layers import make
from tests.moeify.parallel import harness

HIDDEN, INNER = 16, 16  # rows of 64 bytes: MKL rounds by where in memory a row begins


class Cubic(nn.Module):
    """An activation that the kernels do not know, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return self.scale * z**3


def experts(count: int, dtype: torch.dtype, form: str = "") -> Experts:
    gated = form != "custom"
    made = Experts(HIDDEN, INNER, num_experts=count, activation="silu" if gated else "custom", gated=gated,
                   up_rows=2 * INNER if gated else INNER, up_bias=form == "biases", down_bias=form == "biases",
                   region=None if gated else Cubic(), region_widths=() if gated else (INNER,),
                   dtype=dtype)  # fmt: skip
    draw = torch.Generator().manual_seed(5)
    for parameter in made.parameters(recurse=False):
        nn.init.normal_(parameter, generator=draw)
    return made


def part(whole: Experts, rank: int, world: int, form: str) -> Experts:
    each = whole.num_experts // world
    made = experts(each, whole.down_proj.dtype, form)
    for name, parameter in made.named_parameters(recurse=False):
        parameter.data.copy_(whole.get_parameter(name)[rank * each : (rank + 1) * each])
    return made


def routing(tokens: int, count: int, top_k: int, dtype: torch.dtype, seed: int) -> Routing:
    """Choices with an idle expert, and some dropped."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, count, generator=draw)
    scores[:, 1] -= 2.0 * (top_k < count)
    ids = scores.topk(top_k).indices
    ids[torch.rand(ids.shape, generator=draw) < 0.15] = count
    weights = torch.rand(ids.shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    return Routing(ids, weights, scores, scores)


def compare(
    rank: int, world: int, sizes: list[int], count: int, top_k: int, dtype: torch.dtype, form: str,
    dispatcher: Dispatcher | None = None,
) -> None:  # fmt: skip
    """Run all tokens in one process, then this rank's with the other ranks."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(sum(sizes), HIDDEN, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    chosen = routing(sum(sizes), count, top_k, dtype, seed=count + top_k)
    g = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(dtype)
    whole = experts(count, dtype, form)
    expected = whole(x, chosen.expert_ids_TK, chosen.weights_TK)
    torch.autograd.backward(expected, g)

    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x_here = x.detach()[mine].clone().requires_grad_()
    weights = chosen.weights_TK.detach()[mine].clone().requires_grad_()
    here = Routing(chosen.expert_ids_TK[mine], weights, chosen.logits_TE[mine], chosen.scores_TE[mine], capacity=1)
    local = part(whole, rank, world, form)
    dispatcher = dispatcher or ExpertParallel(Link(group(), ("layer",), 0), count // world, count)
    sent = dispatcher.dispatch(x_here, here)
    out = dispatcher.combine(local(sent.x, sent.expert_ids, sent.weights), sent)
    torch.autograd.backward(out, g[mine])

    each = count // world
    wanted = {n: p.grad[rank * each : (rank + 1) * each] for n, p in whole.named_parameters(recurse=False)
              if p.grad is not None}  # fmt: skip
    found = {name: p.grad for name, p in local.named_parameters(recurse=False)}
    assert wanted.keys() == found.keys()
    pairs = {name: (found[name], wanted[name]) for name in wanted}
    assert x.grad is not None and chosen.weights_TK.grad is not None
    pairs |= {"x": (x_here.grad, x.grad[mine]), "weights": (weights.grad, chosen.weights_TK.grad[mine])}
    for name, (actual, want) in pairs.items():
        assert actual is not None and actual.equal(want), (name, sizes, count, top_k, dtype, form)
    if dtype is torch.float64:
        assert out.equal(expected[mine]), ("out", sizes, count, top_k, form, (out - expected[mine]).abs().max())
    else:
        torch.testing.assert_close(out, expected[mine])


def group() -> Any:
    return dist.group.WORLD


def splits(world: int) -> list[list[int]]:
    return [[9] * world, [0] * (world - 1) + [17], [17] + [0] * (world - 1)]


def case_outputs_and_gradients_are_equal_to_the_last_bit(rank: int, world: int) -> None:
    for dtype in (torch.float64, torch.float32):
        for count, top_k in ((8, 2), (8, 1), (4, 4)):
            for sizes in splits(world):
                compare(rank, world, sizes, count, top_k, dtype, "")
        compare(rank, world, [7] * world, 8, 3, dtype, "biases")
    compare(rank, world, [7] * world, 8, 3, torch.float64, "custom")


def case_no_token_at_all_and_no_choice_at_all(rank: int, world: int) -> None:
    compare(rank, world, [0] * world, 8, 2, torch.float64, "")
    local = experts(2, torch.float64)
    dispatcher = ExpertParallel(Link(group(), ("layer",), 0), 2, 2)
    x = torch.ones(3, HIDDEN, dtype=torch.float64, requires_grad=True)
    nobody = Routing(torch.full((3, 2), 2 * world), torch.ones(3, 2), torch.zeros(3, 2), torch.zeros(3, 2))
    sent = dispatcher.dispatch(x, nobody)
    out = dispatcher.combine(local(sent.x, sent.expert_ids, sent.weights), sent)
    torch.autograd.backward(out.sum())
    assert not out.any() and x.grad is not None and not x.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in local.parameters())


@contextmanager
def counted(rank: int, world: int) -> Iterator[list[int]]:
    """Note the bytes that go to other ranks, exchange by exchange."""
    sent_bytes: list[int] = []
    original = dist.all_to_all_single

    def counting(out: Tensor, x: Tensor, received: Any = None, sent: Any = None, **kwargs: Any) -> Any:
        rows = [len(x) // world] * world if sent is None else sent
        sent_bytes.append((sum(rows) - rows[rank]) * x[:1].nbytes if len(x) else 0)
        return original(out, x, received, sent, **kwargs)

    dist.all_to_all_single = counting  # type: ignore[assignment]
    try:
        yield sent_bytes
    finally:
        dist.all_to_all_single = original


def case_one_row_and_one_weight_travel_for_each_kept_choice(rank: int, world: int) -> None:
    """Bytes to other ranks: P rows of H values and a weight, four times (forward and back), and the counts.

    The estimate counts the same bytes, and those of what autograd keeps, for these choices and for an even routing.
    """
    count, tokens, top_k = 8, 16, 2
    local = experts(count // world, torch.float32)
    weights = {p.untyped_storage().data_ptr() for p in local.parameters()}
    shape = Layer(1, count, top_k, HIDDEN, INNER, 2 * INNER, 3 * HIDDEN * INNER)
    setup = Setup((shape,), 0, 4, ep=world, copies=1, tokens=tokens, bandwidth=1.0, flops=1.0)
    even = torch.arange(tokens * top_k).view(tokens, top_k) % count
    for ids in (routing(tokens, count, top_k, torch.float32, seed=rank).expert_ids_TK, even):
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(tokens, HIDDEN, requires_grad=True)
        chosen = Routing(ids, torch.rand(ids.shape, requires_grad=True), torch.zeros(1), torch.zeros(1))
        dispatcher = ExpertParallel(Link(group(), ("layer",), 0), count // world, count // world)
        with counted(rank, world) as sent_bytes:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                sent = dispatcher.dispatch(x, chosen)
                out = dispatcher.combine(local(sent.x, sent.expert_ids, sent.weights), sent)
            torch.autograd.backward(out.sum())
        owner = ids // (count // world)
        away = int(((owner != rank) & (ids < count)).sum())
        came = sent.x.shape[0] - int((owner == rank).sum())
        counts = (world - 1) * (5 + count // world) * 8
        row, weight = HIDDEN * 4, 4
        assert sent_bytes[:4] == [counts, away * row, away * weight, came * row]
        assert sorted(sent_bytes[4:]) == sorted([away * row, came * row, came * weight])  # the same ways back
        assert sum(sent_bytes) == exchanged_bytes(shape, setup, away, came)
        activations = sum(size for place, size in kept.items() if place not in weights)
        assert activations == kept_bytes(shape, setup, sent.x.shape[0])
    free = estimate(setup).layers[0].at[-1]
    assert (free.exchanged, free.kept) == (sum(sent_bytes), activations)  # of the even routing


def case_layers_give_what_they_give_on_one_rank(rank: int, world: int) -> None:
    """Whole layers: capacity, shared experts, routers that look at other tokens, soft mixtures, attached losses."""
    configs = {
        "dropped": MoEConfig(8, 3, capacity_factor=0.5),
        "shared": MoEConfig(8, 2, shared_experts=2),
        "attached": MoEConfig(8, 2, aux_loss=0.3, attach_losses=True),
        "expert choice": MoEConfig.expert_choice(8),
        "sigmoid": MoEConfig(8, 2, router=routers.Sigmoid(bias_rate=1e-3)),
        "soft": MoEConfig(8, 1, router=routers.Soft(slots=3), aux_loss=0.0),
    }
    for name, config in configs.items():
        alone, shared = (make.layer(config, dtype=torch.float64) for _ in range(2))
        each = config.experts // world
        shared.dispatcher = ExpertParallel(Link(group(), ("layer",), 0), each, each)
        for key, parameter in list(shared.experts.named_parameters(recurse=False)):
            setattr(shared.experts, key, nn.Parameter(parameter.detach()[rank * each : (rank + 1) * each].clone()))
        shared.experts.num_experts = each
        assert isinstance(alone.dispatcher, LocalDispatcher)
        xs = [make.inputs(2, 5, seed=r, dtype=torch.float64).requires_grad_() for r in range(world)]
        outs = [alone(x) for x in xs]
        for out in outs:
            torch.autograd.backward(out.square().sum())
        x = make.inputs(2, 5, seed=rank, dtype=torch.float64).requires_grad_()
        out = shared(x)
        torch.autograd.backward(out.square().sum())
        tolerance = TOLERANCE["float64"]
        close = {"out": (out, outs[rank]), "x": (x.grad, xs[rank].grad)}
        for key, parameter in shared.experts.named_parameters(recurse=False):
            whole = alone.experts.get_parameter(key).grad
            close[key] = parameter.grad, whole[rank * each : (rank + 1) * each]
        for key, (actual, wanted) in close.items():
            assert actual is not None and wanted is not None
            assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max(), (name, key)


def case_what_stops_one_rank_is_said_by_all(rank: int, world: int) -> None:
    for level in ("batch", "global"):  # of which one counts on all ranks first
        layer = make.layer(MoEConfig(4, 2, balance_level=level), dtype=torch.float64)
        layer.dispatcher = ExpertParallel(Link(group(), ("model.layers.1.mlp",), 0), 4 // world, 4 // world)
        x = make.inputs(2, 5, dtype=torch.float64)
        if rank == 1:
            x[0, 0] = torch.nan
        with pytest.raises(MoeifyError) as caught:
            layer(x)
        said = "rank 1: model.layers.1.mlp: 1 of 10 tokens have a router logit that is NaN or infinite; look for"
        assert str(caught.value).startswith(said)


def case_ranks_at_different_layers_or_dtypes_are_told(rank: int, world: int) -> None:
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    chosen = routing(3, 8, 2, torch.float32, seed=0)
    apart = ExpertParallel(Link(group(), ("first", "second"), int(rank == 1)), 8 // world, 8)
    with pytest.raises(MoeifyError, match=r"rank \d disagree on the layer \((first and second|second and first)\)"):
        apart.dispatch(x, chosen)
    same = ExpertParallel(Link(group(), ("first", "second"), 0), 8 // world, 8)
    with pytest.raises(MoeifyError, match="disagree on the bytes of a value"):
        same.dispatch(x.float() if rank == 1 else x, chosen)
    with pytest.raises(MoeifyError, match="disagree on the hidden size"):
        same.dispatch(x[:, int(rank == 1) :], chosen)


test_on_several_ranks = harness.on_several_ranks(__name__, 2, 4)
