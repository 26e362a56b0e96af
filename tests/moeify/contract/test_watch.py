"""A capacity on stock layers, losses of what was seen, and modes in which nothing may be seen twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moeify.contract.found import find_layers
from moeify.contract.track import track
from moeify.contract.watch import Watch, choice_names, stock_losses
from tests.moeify import native, tiny


def watch_of(model: nn.Module, number: int = 0) -> Watch:
    track(model)
    state = list(find_layers(model).values())[number].state
    assert isinstance(state, Watch)
    return state


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "dbrx", "phimoe"])
@torch.no_grad()
def test_a_capacity_takes_the_latest_choices_away(name: str) -> None:
    model = native.build(name)
    watch, layer = watch_of(model), next(iter(find_layers(model).values()))
    given: dict[Any, Any] = {}
    layer.experts[0].register_forward_pre_hook(  # after the watch: it sees what the experts get
        lambda _, args, kwargs: given.update(enumerate(args), **kwargs), with_kwargs=True
    )
    model(**native.inputs(name))
    ids, weights, free = given[1], given[2], model(**native.inputs(name)).logits
    watch.set_capacity(train=None, evaluation=0.5)
    model(**native.inputs(name))
    capacity, taken = -(-22 * native.TOP_K // (2 * native.EXPERTS)), [0] * native.EXPERTS
    expected = torch.zeros_like(weights)
    for choice in range(native.TOP_K):  # first choices before second ones, then earlier tokens
        for token in range(22):
            expert = int(ids[token, choice])
            taken[expert] += 1
            if taken[expert] <= capacity:
                expected[token, choice] = weights[token, choice]
    assert torch.equal(given[2], expected) and torch.equal(given[1], ids)
    assert watch.record is not None and watch.record.dropped is not None
    assert watch.record.dropped == sum(max(count - capacity, 0) for count in taken) > 0
    assert torch.equal(watch.record.routing.expert_ids_TK, ids)  # the load counts them
    model.train()
    assert watch.capacity_factor is None
    watch.set_capacity(train=None, evaluation=None)
    assert torch.equal(model.eval()(**native.inputs(name)).logits, free)


@torch.no_grad()
def test_padding_takes_no_capacity() -> None:
    model, given = native.build("mixtral"), native.inputs("mixtral")
    watch = watch_of(model)
    watch.set_capacity(train=None, evaluation=100.0)
    mask = torch.zeros_like(given["input_ids"])
    mask[0] = 1
    model(**given, attention_mask=mask)
    assert watch.record is not None and watch.record.dropped == 0
    watch.set_capacity(train=None, evaluation=0.01)
    model(**given, attention_mask=mask)
    counts = watch.record.routing.expert_ids_TK[:11].flatten().bincount()
    least = 4  # as of a converted layer: in decoding there are few tokens
    assert watch.record is not None and watch.record.dropped == (counts - least).clamp(min=0).sum() > 0


@torch.no_grad()
def test_what_a_router_drops_itself_is_counted() -> None:
    model = native.build("switch")
    watch = watch_of(model)
    router: Any = next(iter(find_layers(model).values())).router
    router.expert_capacity = 2
    model(**native.inputs("switch"))
    assert watch.record is not None
    ids = watch.record.routing.expert_ids_TK.view(2, 11)
    over = sum(max(int((row == expert).sum()) - 2, 0) for row in ids for expert in range(native.EXPERTS))
    assert over > 0 and watch.record.dropped == (0 if native.OLD else over)  # the old router counts, and drops nothing


class _Choosing(nn.Module):
    """A router that returns its choices and their weights, and keeps its logits to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(7, native.EXPERTS)

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        weights_TK, ids_TK = self.classifier(x_TH).softmax(-1).topk(2)
        return weights_TK, ids_TK


@torch.no_grad()
def test_logits_that_a_router_does_not_return_are_heard_inside_it() -> None:
    router, experts, x_TH = _Choosing(), nn.Identity(), torch.randn(5, 7)
    watch = Watch(native.EXPERTS, 2, 0)  # transformers 5.17 says that the weights are the logits of Switch
    watch.attach(router, experts)
    router(x_TH)
    experts(x_TH)
    assert watch.record is not None
    assert torch.equal(watch.record.routing.logits_TE, router.classifier(x_TH))


def test_the_balancing_loss_of_several_layers_is_that_of_transformers() -> None:
    model = native.build("mixtral")
    track(model)
    model(**native.inputs("mixtral"))
    records = [layer.record for layer in find_layers(model).values() if layer.record is not None]
    logits: Any = tuple(record.routing.logits_TE for record in records)
    found, expected = stock_losses(records), load_balancing_loss_func(logits, native.EXPERTS, native.TOP_K)
    torch.testing.assert_close(found["balance"], expected)
    torch.testing.assert_close(found["z"], torch.cat(logits).logsumexp(-1).square().mean())


def test_a_replayed_forward_is_not_seen() -> None:
    model, given = native.build("mixtral").train(), native.inputs("mixtral")
    watch = watch_of(model)
    watch.set_capacity(train=0.5, evaluation=None)
    tiny.enable_checkpointing(model, {"use_reentrant": False})
    loss = model(**given, labels=given["input_ids"]).loss
    seen = watch.record
    assert seen is not None
    loss.backward()  # runs the layers again, with the same choices taken away
    assert watch.record is not None and watch.record.routing.logits_TE is seen.routing.logits_TE


def test_a_compiled_model_is_seen() -> None:
    model, given = native.build("mixtral"), {**native.inputs("mixtral"), "use_cache": False}
    model.set_experts_implementation("batched_mm")
    watch = watch_of(model, 1)
    model(**given)
    assert watch.record is not None
    expected = watch.record.routing.logits_TE
    watch._seen = None
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(**given)
    assert watch.record is not None
    torch.testing.assert_close(watch.record.routing.logits_TE, expected)


def test_names_of_choices_and_weights() -> None:
    models = {name: next(iter(find_layers(native.build(name)).values())).experts[0] for name in ("mixtral", "gpt_oss")}
    assert choice_names(models["mixtral"]) == ("top_k_index", "top_k_weights")
    assert choice_names(models["gpt_oss"]) == ("router_indices", "routing_weights")
    assert choice_names(nn.Linear(2, 2)) is None
