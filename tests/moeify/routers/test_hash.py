from __future__ import annotations

import pytest
import torch

import moeify
from moeify.config import MoEConfig
from moeify.errors import ConfigError, MoeifyError
from moeify.routers.hash import Hash, HashRouter, hash_table, hash_tokens
from moeify.routing.record import RoutingContext


def test_hash_routes_every_occurrence_of_a_token_alike() -> None:
    table = hash_table(101, 7, 0, "hash")
    assert sorted(torch.bincount(table, minlength=7).tolist()) == [14] * 4 + [15] * 3
    assert torch.equal(table, hash_table(101, 7, 0, "hash"))
    assert not torch.equal(table, hash_table(101, 7, 1, "hash"))
    tokens = torch.tensor([100, 3, 3, 0])
    routing = hash_tokens(tokens, table, 7)
    assert routing.expert_ids_TK.tolist() == [[int(table[i])] for i in tokens]
    assert routing.weights_TK.tolist() == [[1.0]] * 4
    assert routing.scores_TE.argmax(-1).tolist() == routing.expert_ids_TK[:, 0].tolist()


@pytest.mark.parametrize("training", [True, False])
def test_the_module_looks_up_the_token_ids_of_the_context(training: bool) -> None:
    options = Hash(vocab_size=11)
    config = MoEConfig(5, 1, router=options)
    router, ids = HashRouter(options, 13, config, torch.zeros).train(training), torch.tensor([3, 10, 3])
    router.table.copy_(options.start(config, 13, "mlp")["table"].build())
    assert router(torch.zeros(3, 13), RoutingContext(token_ids_T=ids)).expert_ids_TK[:, 0].equal(router.table[ids])
    with pytest.raises(MoeifyError, match="call the model with `input_ids`"):
        router(torch.zeros(3, 13))


def test_facts_and_what_it_needs() -> None:
    assert Hash.needs_token_ids
    assert MoEConfig(5, 1, router=Hash(vocab_size=11), renormalize=False).exact
    assert not MoEConfig(5, 1, router=Hash(vocab_size=11), eval_capacity_factor=1.0).exact
    with pytest.raises(ConfigError, match=r"router\.vocab_size is None: the router 'hash' needs the number"):
        MoEConfig(5, 1, router="hash")
    with pytest.raises(ConfigError, match="top_k is 2: the router 'hash' takes 1"):
        MoEConfig(5, 2, router=moeify.routers.Hash(vocab_size=11))
    with pytest.raises(ConfigError, match=r"router\.vocab_size is 0: expected a whole number of at least 1"):
        Hash(vocab_size=0)
