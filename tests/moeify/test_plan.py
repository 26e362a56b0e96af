from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeify.config import MoEConfig
from moeify.errors import ConfigError
from moeify.plan import Plan, Rows, Site

names = st.text("abc.0_", min_size=1, max_size=9)
sizes = st.integers(1, 99)
rows = st.builds(
    Rows,
    parameter=names,
    bias=st.none() | names,
    start=st.integers(0, 9),
    stop=st.integers(10, 99),
    step=st.integers(1, 2),
    out_features=st.integers(99, 200),
    transposed=st.booleans(),
)
sites = st.builds(
    Site,
    path=names,
    bypassed=st.lists(names, max_size=2).map(tuple),
    kind=st.sampled_from(["glu", "mlp"]),
    activation=st.sampled_from(["silu", "custom"]),
    hidden=sizes,
    intermediate=sizes,
    ups=st.lists(rows, min_size=1, max_size=3).map(tuple),
    down=rows,
    dropout=st.floats(0, 0.9),
    expert_dropout=st.floats(0, 0.9),
    activation_state=st.lists(st.tuples(names, names), max_size=2).map(tuple),
)
configs = st.builds(MoEConfig, st.integers(2, 64), st.integers(1, 2), seed=st.integers(0, 2**40))
plans = st.builds(Plan, names, configs, st.lists(sites, max_size=3).map(tuple), st.sampled_from(["moeify", "mixtral"]))


@given(plans)
def test_plans_go_to_json_and_back(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


@given(plans, st.sampled_from(["model_type", "config", "sites", "target"]))
def test_a_plan_that_lacks_something_is_refused(plan: Plan, key: str) -> None:
    data = plan.to_dict()
    del data[key]
    with pytest.raises(ConfigError, match="damaged"):
        Plan.from_dict(data)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"moeify": 99}', "null"])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Plan.from_json(text)


def test_values_out_of_range_in_a_plan_are_refused() -> None:
    data = Plan("llama", MoEConfig(4, 2), ()).to_dict()
    data["config"]["top_k"] = 5
    with pytest.raises(ConfigError, match="top_k is 5"):
        Plan.from_json(json.dumps(data))
