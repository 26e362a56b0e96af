from __future__ import annotations

import math

import torch

from moeify.config import MoEConfig
from moeify.routers.noisy_topk import noisy_topk
from moeify.routers.softmax import softmax_topk
from moeify.routing.losses import load_cv2
from tests.moeify.routers.by_hand import best, close, softmax
from tests.moeify.routing.draw import randn


def test_noisy_topk_is_the_softmax_of_the_best_noisy_logits() -> None:
    clean, raw = randn(4001, 6), randn(1, 6, seed=1).expand(4001, 6)
    torch.manual_seed(2)
    routing = noisy_topk(clean, raw, 2)
    assert routing.clean_logits_TE is not None and routing.noise_std_TE is not None
    close(routing.noise_std_TE[0], [math.log1p(math.exp(value)) + 1e-2 for value in raw[0].tolist()])
    draws = (routing.logits_TE - routing.clean_logits_TE) / routing.noise_std_TE
    assert draws.mean(0).abs().max() < 0.05
    assert (draws.std(0) - 1).abs().max() < 0.05
    for t in range(50):
        noisy = routing.logits_TE[t].tolist()
        ids = best(noisy, 2)
        gates = softmax([noisy[i] for i in ids])
        assert routing.expert_ids_TK[t].tolist() == ids
        close(routing.weights_TK[t], gates)
        close(routing.scores_TE[t], [gates[ids.index(e)] if e in ids else 0.0 for e in range(6)])


def test_noisy_topk_in_evaluation_is_top_k() -> None:
    clean = randn(9, 6)
    routing = noisy_topk(clean, None, 2)
    plain = softmax_topk(clean, 2)
    assert routing.noise_std_TE is None
    assert torch.equal(routing.expert_ids_TK, plain.expert_ids_TK)
    assert torch.equal(routing.weights_TK, plain.weights_TK)


def test_the_module_adds_noise_in_training_only() -> None:
    config = MoEConfig.noisy_topk(5, 2)
    router, x = config.router.module(13, config), randn(7, 13)
    with torch.no_grad():
        router.get_parameter("weight").copy_(randn(5, 13, seed=1))
        evaluated, trained = router.eval()(x), router.train()(x)
    assert torch.equal(evaluated.logits_TE, trained.clean_logits_TE) and evaluated.noise_std_TE is None
    close(trained.noise_std_TE, torch.full((7, 5), math.log(2) + 1e-2))  # what zero noise weights mean
    assert not torch.equal(evaluated.logits_TE, trained.logits_TE)


def test_the_noise_starts_at_zero_weight() -> None:
    config = MoEConfig.noisy_topk(6, 2, granularity=2)
    start = config.router.start(config, 13, "mlp")
    assert [start["noise_weight"].shape, start["noise_weight"].dtype] == [(6, 13), None]
    assert not start["noise_weight"].build().any() and start["weight"].build().any()


def test_the_load_loss_has_finite_gradients_however_small_the_noise_became() -> None:
    clean, raw = randn(64, 8).requires_grad_(), torch.full((64, 8), -110.0, requires_grad=True)
    routing = noisy_topk(clean, raw, 2)
    assert routing.clean_logits_TE is not None and routing.noise_std_TE is not None
    loss = load_cv2(routing.clean_logits_TE, routing.logits_TE, routing.noise_std_TE, 2)
    for gradient in torch.autograd.grad(loss, (clean, raw)):
        assert gradient.isfinite().all()


def test_the_shards_of_an_ffn_share_a_draw_and_are_chosen_together() -> None:
    config = MoEConfig.noisy_topk(12, 6, granularity=3)
    router, x = config.router.module(13, config).train(), randn(200, 13)
    with torch.no_grad():
        for name, seed in (("weight", 1), ("noise_weight", 2)):
            router.get_parameter(name).copy_(randn(4, 13, seed=seed).repeat_interleave(3, dim=0))
        groups = router(x).expert_ids_TK.sort().values // 3
    assert (groups.view(200, 2, 3) == groups.view(200, 2, 3)[..., :1]).all()
