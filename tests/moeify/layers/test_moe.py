from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moeify.config import MoEConfig
from moeify.errors import MoeifyError
from moeify.kernels import reference
from moeify.measure import TOLERANCE
from moeify.routers.sigmoid import updated_bias
from tests.moeify.layers import make
from tests.moeify.layers.make import LEARNED, SPARSE, assert_same, call, gradients


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_computes_what_its_record_says(name: str, training: bool) -> None:
    layer = make.layer(make.CONFIGS[name]).train(training)
    x = make.inputs(3, 7)
    out = call(layer, x)
    record, experts = layer.record, layer.experts
    ids = record.routing.expert_ids_TK
    expected = reference.experts(x.view(21, -1), ids, record.routing.weights_TK, experts.up, experts.down_proj,
                                 None, None, "silu", True)  # fmt: skip
    if record.dropped is not None and record.dropped > 0:
        changed = (out.view(21, -1) - expected).abs().amax(-1) > 1e-4
        assert 0 < int(changed.sum()) <= int(record.dropped)
    else:
        assert (out.view(21, -1) - expected).abs().max() <= TOLERANCE["float32"] * expected.abs().max()


@pytest.mark.parametrize("name", LEARNED)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    layer = make.layer(make.CONFIGS[name])
    found = gradients(layer, call(layer, make.inputs(3, 7)))
    assert found.keys() == dict(layer.named_parameters()).keys()
    assert all(g.isfinite().all() and g.any() for g in found.values())


@pytest.mark.parametrize("name", SPARSE)
def test_one_token_no_token_and_fewer_tokens_than_experts(name: str) -> None:
    layer = make.layer(make.CONFIGS[name])
    for tokens in (0, 1, 3):
        out = call(layer, make.inputs(1, tokens))
        assert out.shape == (1, tokens, make.HIDDEN)
        assert all(g.isfinite().all() for g in gradients(layer, out).values())
    assert call(layer, make.inputs(0, 4)).shape == (0, 4, make.HIDDEN)


def test_an_expert_without_tokens_gets_zero_gradients() -> None:
    layer = make.layer(MoEConfig(5, 1, renormalize=False))
    with torch.no_grad():
        layer.router.weight.zero_()[2] = 1.0
    found = gradients(layer, call(layer, make.inputs(1, 7).abs()))
    assert layer.record.routing.expert_ids_TK.eq(2).all()
    up = found["experts.gate_up_proj"].flatten(1).abs().amax(1)
    assert up[2] > 0 and up[[0, 1, 3, 4]].eq(0).all()


def test_all_experts_chosen_and_ties_in_bfloat16() -> None:
    layer = make.layer(MoEConfig(5, 5), dtype=torch.bfloat16)
    with torch.no_grad():
        layer.router.weight.zero_()
    call(layer, make.inputs(2, 3, dtype=torch.bfloat16))
    ids = layer.record.routing.expert_ids_TK
    assert ids.sort().values.equal(torch.arange(5).expand(6, 5))


def test_capacity_differs_between_training_and_evaluation_and_drops_are_counted() -> None:
    layer = make.layer(MoEConfig(5, 2, capacity_factor=0.5, eval_capacity_factor=5.0))
    x = make.inputs(3, 7)
    call(layer, x)
    chosen = torch.bincount(layer.record.routing.expert_ids_TK.flatten(), minlength=5)
    capacity = 5  # ceil(0.5 * 21 * 2 / 5)
    assert layer.record.dropped == (chosen - capacity).clamp(min=0).sum() > 0
    layer.eval()
    call(layer, x)
    assert layer.record.dropped == 0
    layer.set_capacity(train=None, evaluation=None)
    call(layer, x)
    assert layer.record.dropped is None


def test_a_router_that_keeps_to_the_capacity_is_not_limited_again() -> None:
    layer = make.layer(make.CONFIGS["expert_choice"])
    call(layer, make.inputs(3, 7))
    assert layer.record.dropped is None


def test_a_dropped_token_contributes_zero() -> None:
    layer = make.layer(MoEConfig(5, 1, renormalize=False, capacity_factor=0.1, min_capacity=1))
    out = call(layer, make.inputs(1, 21))  # each expert takes 1 choice
    first_of_expert = {int(e): t for t, e in reversed(list(enumerate(layer.record.routing.expert_ids_TK[:, 0])))}
    kept = torch.zeros(21, dtype=torch.bool)
    kept[list(first_of_expert.values())] = True
    assert (out[0].abs().amax(-1) > 0).equal(kept)


@pytest.mark.parametrize("name", LEARNED)
def test_padding_changes_no_loss_takes_no_capacity_and_may_hold_anything(name: str) -> None:
    layer = make.layer(replace(make.CONFIGS[name], z_loss=0.1, jitter=0.0)).eval()
    x = make.inputs(2, 9)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 4:] = 0
    call(layer, x, mask)
    losses, routing = layer.losses(), layer.record.routing
    other = x.clone()
    other[1, 4:] = 100.0
    call(layer, other, mask)
    real = mask.bool().flatten()
    assert layer.record.routing.expert_ids_TK[real].equal(routing.expert_ids_TK[real])
    for loss, value in layer.losses().items():
        torch.testing.assert_close(value, losses[loss], msg=loss)
    assert losses["z"] < 100


def test_padding_alone_gives_zero_losses() -> None:
    layer = make.layer(MoEConfig(5, 2, z_loss=0.1, capacity_factor=1.0))
    out = call(layer, make.inputs(2, 3), torch.zeros(2, 3))
    assert all(value == 0 for value in layer.losses().values())
    assert layer.record.dropped == 0
    assert all(g.isfinite().all() for g in gradients(layer, out).values())


def test_attached_losses_give_the_gradients_of_losses_that_are_added() -> None:
    config = MoEConfig(5, 2, aux_loss=0.3, z_loss=0.2, capacity_factor=1.0, attach_losses=False)
    x = make.inputs(3, 7)
    added, attached = make.layer(config), make.layer(replace(config, attach_losses=True))
    expected = gradients(added, call(added, x))
    assert_same(gradients(attached, call(attached, x)), expected)
    attached.loss_scale = 0.0
    without = gradients(attached, call(attached, x))
    assert not torch.allclose(without["router.weight"], expected["router.weight"])


@pytest.mark.parametrize("level", ["batch", "sequence"])
def test_levels_of_balance(level: Any) -> None:
    layer = make.layer(MoEConfig(5, 2, balance_level=level, divide_loss_by_top_k=True))
    call(layer, make.inputs(3, 7))
    routing = layer.record.routing
    parts = [slice(0, 21)] if level == "batch" else [slice(0, 7), slice(7, 14), slice(14, 21)]
    values = []
    for part in parts:
        chosen = torch.bincount(routing.expert_ids_TK[part].flatten(), minlength=5) / (2 * (part.stop - part.start))
        values.append(5 * (chosen * routing.scores_TE[part].mean(0)).sum())
    torch.testing.assert_close(layer.losses()["balance"], torch.stack(values).mean())


def test_noise_adds_the_load_loss() -> None:
    layer = make.layer(make.CONFIGS["noisy_topk"])
    call(layer, make.inputs(3, 7))
    noisy = layer.losses()["balance"]
    layer.record.routing = replace(layer.record.routing, noise_std_TE=None)
    assert noisy > layer.losses()["balance"] > 0


def test_the_selection_bias_is_counted_moved_and_kept_in_float32() -> None:
    layer = make.layer(make.CONFIGS["deepseek_v3"])
    for seed in (1, 2):
        call(layer, make.inputs(3, 7, seed=seed))
    router = layer.router
    counts = layer.counts_E
    assert counts.sum() == 2 * 21 * 2
    router.update_bias(counts)
    expected = updated_bias(torch.zeros(6), counts, 1e-3)
    assert router.selection_bias.equal(expected) and expected.any()
    layer.counts_E = None
    assert layer.to(torch.bfloat16).router.selection_bias.dtype == torch.float32
    layer.eval()
    call(layer, make.inputs(3, 7, dtype=torch.bfloat16))
    assert layer.counts_E is None  # evaluation does not count


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_logit_that_is_no_number_names_the_layer(wrong: float) -> None:
    layer = make.layer(MoEConfig(5, 2))
    x = make.inputs(2, 3)
    x[1, 2, 0] = wrong
    with pytest.raises(MoeifyError, match=r"model.layers.1.mlp: 1 of 6 tokens have a router logit that is NaN or inf"):
        call(layer, x)
    call(layer, x, torch.tensor([[1, 1, 1], [1, 1, 0]]))  # padding may hold anything


def test_hash_routing_without_token_ids_says_so() -> None:
    layer = make.layer(make.CONFIGS["hash"])
    with pytest.raises(MoeifyError, match="input_ids"):
        layer(make.inputs(2, 3))


def test_a_layer_that_ran_can_be_copied_and_pickled() -> None:
    layer = make.layer(MoEConfig(5, 2))
    out = call(layer, make.inputs(2, 3))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.record is None
        assert call(other, make.inputs(2, 3)).equal(out)


def test_expert_dropout_is_for_training_only() -> None:
    layer = make.layer(MoEConfig(5, 2))
    layer.experts.dropout = 0.5
    x = make.inputs(2, 3)
    trained = call(layer, x)
    layer.eval()
    assert not torch.allclose(trained, call(layer, x))
    layer.experts.dropout = 0.0
    evaluated = call(layer, x)
    layer.experts.dropout = 0.5
    torch.testing.assert_close(call(layer, x), evaluated)


def test_repr_says_what_is_set() -> None:
    config = MoEConfig(5, 2, aux_loss=0.25, z_loss=0.5, capacity_factor=1.5, eval_capacity_factor=2.0)
    layer = make.layer(replace(config, attach_losses=False))
    assert layer.extra_repr() == "capacity_factor=1.5, eval_capacity_factor=2.0"
    layer.set_capacity(train=None, evaluation=None)
    assert layer.extra_repr() == ""
    layer = make.layer(config)
    layer.dropout = 0.125
    layer.set_capacity(train=0.75, evaluation=None)
    assert layer.extra_repr() == "dropout=0.125, aux_loss=0.25, z_loss=0.5, capacity_factor=0.75"


def test_no_device_but_the_cpu_is_waited_for() -> None:
    layer = make.layer(MoEConfig(5, 2, capacity_factor=1.0, z_loss=0.1, shared_experts=0)).to("meta")
    assert layer(make.inputs(2, 3).to("meta")).shape == (2, 3, make.HIDDEN)  # reading a meta tensor raises


def test_the_state_dict_holds_what_the_router_needs() -> None:
    def names(name: str) -> list[str]:
        return [key for key in make.layer(make.CONFIGS[name]).state_dict() if key.startswith("router.")]

    assert names("softmax") == ["router.weight"]
    assert names("noisy_topk") == ["router.weight", "router.noise_weight"]
    assert names("deepseek_v3") == ["router.weight", "router.selection_bias"]
    assert names("hash") == ["router.table"]
    assert names("soft") == ["router.slots", "router.scale"]


def test_few_tokens_as_in_decoding_lose_no_choice() -> None:
    layer = make.layer(MoEConfig.st_moe(8))
    for tokens in range(1, 5):
        call(layer.eval(), make.inputs(tokens, 1, seed=tokens))
        assert layer.record.dropped == 0
    call(make.layer(MoEConfig.st_moe(8, min_capacity=1)).eval(), make.inputs(4, 1))


def test_the_global_level_counts_the_micro_batches_of_a_step_and_no_others() -> None:
    layer = make.layer(MoEConfig(5, 2, balance_level="global")).train()
    halves = [make.inputs(2, 7, seed=seed) for seed in (0, 1)]
    counts = []
    for x in halves:
        counts.append(torch.bincount(layer.router(x.view(14, -1)).expert_ids_TK.flatten(), minlength=5))
    assert not torch.equal(*counts)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    for _ in range(2):
        for x, expected in zip(halves, (counts[0], counts[0] + counts[1]), strict=True):
            torch.autograd.backward(call(layer, x).sum() + sum(layer.losses().values()))
            assert torch.equal(layer.record.step.counts_E, expected)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    call(layer.eval(), halves[1])
    assert layer.record.step is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_pass_has_the_global_counts_of_the_first(reentrant: bool) -> None:
    found = []
    for recomputed in (True, False):
        layer = make.layer(MoEConfig(5, 2, balance_level="global", aux_loss=1.0)).train()
        for seed in (0, 1):
            x = make.inputs(2, 7, seed=seed).requires_grad_()
            output = checkpoint(layer, x, use_reentrant=reentrant) if recomputed else call(layer, x)
            torch.autograd.backward((cast("Tensor", output) * 0).sum())
        found.append(layer.router.weight.grad)
    assert found[0].any()
    torch.testing.assert_close(*found)


def test_the_share_of_a_layer_scales_its_attached_losses() -> None:
    gradients = []
    for share in (1.0, 0.25):
        layer = make.layer(MoEConfig(5, 2)).train()
        layer.loss_share = share
        torch.autograd.backward((call(layer, make.inputs(2, 7)) * 0).sum())
        gradients.append(layer.router.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0] / 4)
