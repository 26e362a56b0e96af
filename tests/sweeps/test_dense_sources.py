"""Dense models of other sizes."""

from __future__ import annotations

from typing import Any

from sweeps.dense_sources import build


def test_sizes_are_scaled_and_what_is_none_stays() -> None:
    plain: Any = build("phi3 longrope").config
    large: Any = build("phi3 longrope", 4, vocab_size=50).config
    for name in ("hidden_size", "intermediate_size"):
        assert getattr(large, name) == 4 * getattr(plain, name)
    for name in ("num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        assert getattr(large, name) == getattr(plain, name)
    assert (large.vocab_size, plain.vocab_size) == (50, 101)
    small, wide = (config.rope_parameters["short_factor"] for config in (plain, large))
    assert wide == [factor for factor in small for _ in range(4)]
    lfm2: Any = build("lfm2", 4, vocab_size=50).config
    assert lfm2.block_auto_adjust_ff_dim is False
