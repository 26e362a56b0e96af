from __future__ import annotations

from moeify.families import conditions
from moeify.families.base import Condition
from moeify.families.conditions import equal


def test_a_field_that_is_missing_has_its_usual_value() -> None:
    condition = equal("mlp_bias", False, "why")
    assert condition.holds({}) and condition.holds({"mlp_bias": False}) and not condition.holds({"mlp_bias": True})
    assert condition.otherwise == "its config has mlp_bias ≠ False: why"


def test_every_condition_tells_two_configs_apart() -> None:
    plain = {"hidden_size": 32, "num_attention_heads": 4}
    broken = {
        "architectures": ["LlamaModel"], "attention_bias": True, "mlp_bias": True, "sliding_window": 4, "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"], "no_rope_layers": [1, 0],
        "use_bidirectional_attention": True, "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.5},
    }  # fmt: skip
    for name, condition in vars(conditions).items():
        if isinstance(condition, Condition):
            assert condition.holds(plain) and not condition.holds({**plain, **broken}), name
