from __future__ import annotations

from dataclasses import replace

from moeify.config import MoEConfig
from moeify.families.base import dense_layers, first_converted, head_dim, kv_heads, random_rows
from moeify.families.table import FAMILIES
from moeify.plan import Plan
from tests.moeify.conversion.test_stored_tensors import SITE

CONFIG = MoEConfig(4, 2)


def test_layers_are_counted_by_the_numbers_in_their_paths() -> None:
    plan = Plan("llama", CONFIG, tuple(replace(SITE, path=f"model.layers.{n}.mlp") for n in (1, 3)))
    assert dense_layers(plan, {"num_hidden_layers": 5}) == [0, 2, 4] and first_converted(plan) == 1


def test_heads_have_their_usual_sizes_where_a_config_does_not_say() -> None:
    config = {"hidden_size": 32, "num_attention_heads": 4}
    assert (head_dim(config), kv_heads(config)) == (8, 4)
    assert (head_dim({**config, "head_dim": 16}), kv_heads({**config, "num_key_value_heads": 2})) == (16, 2)


def test_random_rows_depend_on_seed_and_name_alone() -> None:
    start = random_rows(6)
    values = start("a", SITE, CONFIG).build()
    assert values.shape == (6, SITE.hidden) and values.equal(start("a", SITE, CONFIG).build())
    assert not values.equal(start("b", SITE, CONFIG).build())


def test_a_family_says_whether_it_insists_on_a_shared_expert() -> None:
    found = {name: FAMILIES[name].idle for name in ("mixtral", "qwen2_moe", "glm4_moe", "ernie4_5_moe")}
    assert found == {"mixtral": None, "qwen2_moe": 128, "glm4_moe": 0, "ernie4_5_moe": None}
