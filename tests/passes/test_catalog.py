from __future__ import annotations

from moeify.passes.catalog import describe


def test_every_pass_describes_itself() -> None:
    names = [pass_.name for pass_ in describe()]
    assert names == ["find_ffn", "insert_moe", "insert_losses", "lower"]
    for pass_ in describe():
        assert pass_.summary.endswith(".")
        assert pass_.before and pass_.after and pass_.refuses
    assert describe()[1].before.startswith("%up   = linear(%x, mlp.up.weight)")
    assert describe()[2].options == ("attach",)
