from __future__ import annotations

import re

import torch

from moeify.families.attention import HALVES_TO_PAIRS, PAIRS_TO_HALVES, SPLIT_QKV, no_sinks, zero_biases

CONFIG = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}


def test_rows_that_rotate_together_become_neighbors_and_come_back() -> None:
    rows, (to_pairs,), (back,) = (
        torch.arange(16.0),
        HALVES_TO_PAIRS[0].parts.values(),
        PAIRS_TO_HALVES[0].parts.values(),
    )
    assert to_pairs(rows, CONFIG)[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert back(to_pairs(rows, CONFIG), CONFIG).equal(rows)
    partial = {**CONFIG, "rope_parameters": {"partial_rotary_factor": 0.5}}
    assert to_pairs(rows, partial)[:8].tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    found = re.fullmatch(HALVES_TO_PAIRS[1].pattern, "model.layers.3.self_attn.k_proj.bias")
    assert found and [found.expand(part) for part in HALVES_TO_PAIRS[1].parts] == [found[0]]


def test_a_fused_projection_is_cut_by_heads() -> None:
    fused = torch.arange(32.0)
    parts = [cut(fused, CONFIG) for cut in SPLIT_QKV.parts.values()]
    assert [len(part) for part in parts] == [16, 8, 8] and torch.cat(parts).equal(fused)
    assert re.fullmatch(SPLIT_QKV.pattern, "model.layers.3.self_attn.qkv_proj.weight")


def test_what_is_added_changes_nothing() -> None:
    biases = zero_biases("q", "k", "v", "o")
    wide = {**CONFIG, "head_dim": 12}
    assert [tuple(build(wide).shape) for build in biases.values()] == [(24,), (12,), (12,), (16,)]
    assert torch.cat([build(CONFIG) for build in biases.values()]).eq(0).all()
    assert no_sinks(CONFIG).exp().eq(0).all()
