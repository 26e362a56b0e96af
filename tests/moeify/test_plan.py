from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    handing=st.lists(names, max_size=2).map(tuple),
    axis=st.integers(-4, -1),
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


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"moeify": 99}', "null", b"\xff\xfe", '{"moeify": %s}' % ("2" * 5000), '{"a":' * 9999]
)
def test_what_is_no_plan_is_refused(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Plan.from_json(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    (tmp_path / "plan.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError):
        Plan.from_file(tmp_path / "plan.json")


def test_a_plan_is_read_from_its_file(tmp_path: Path) -> None:
    plan = Plan("llama", MoEConfig(4, 2), ())
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Plan.from_file(tmp_path / "plan.json") == plan
    with pytest.raises(ConfigError, match=r"--plan: .*cannot be read: it is a folder"):
        Plan.from_file(tmp_path)


ROWS = {"parameter": "w", "bias": None, "start": 0, "stop": 4, "step": 1, "out_features": 4, "transposed": False}
SITE = {"path": "a", "bypassed": [], "kind": "mlp", "activation": "relu", "hidden": 4, "intermediate": 4, "ups": [ROWS],
        "down": ROWS, "dropout": 0.0, "expert_dropout": 0.0, "activation_state": [["a", "b"]]}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"target": ["moeify"]}, "its target is .*: expected a text"),
        ({"model_type": 3}, "its model_type is 3: expected a text"),
        ({"sites": 3}, "the plan is damaged"),
        ({"sites": [3]}, "the plan is damaged"),
        ({"sites": [{**SITE, "path": ["a"]}]}, "a site's path is .*: expected a text"),
        ({"sites": [{**SITE, "bypassed": [1]}]}, "a site's bypassed is .*: expected a list, of each a text"),
        ({"sites": [{**SITE, "handing": [1]}]}, "a site's handing is .*: expected a list, of each a text"),
        ({"sites": [{**SITE, "axis": "-1"}]}, "a site's axis is '-1': expected a whole number"),
        ({"sites": [{**SITE, "hidden": "4"}]}, "a site's hidden is '4': expected a whole number"),
        ({"sites": [{**SITE, "activation_state": [["a"]]}]}, "the plan is damaged"),
        ({"sites": [{**SITE, "activation_state": [["a", "b", "c"]]}]}, "the plan is damaged"),
        ({"sites": [{**SITE, "activation_state": [["a", 1]]}]}, "a site's activation_state is"),
        ({"sites": [{**SITE, "down": {**ROWS, "start": 0.5}}]}, "in a, start is 0.5: expected a whole number"),
        ({"sites": [{**SITE, "ups": [{**ROWS, "bias": 1}]}]}, "in a, bias is 1: expected a text or None"),
        ({"config": 3}, "these are not the settings"),
        ({"config": {"experts": 10**9, "top_k": 2}}, "experts is 1000000000: expected .* at most 8192"),
    ],
)
def test_a_plan_with_values_of_other_kinds(change: dict[str, Any], message: str | None) -> None:
    data = {**Plan("llama", MoEConfig(4, 2), ()).to_dict(), "sites": [SITE], **change}
    if message is None:
        assert len(Plan.from_json(json.dumps(data)).sites) == 1
        return
    with pytest.raises(ConfigError, match=message):
        Plan.from_json(json.dumps(data))


def test_values_out_of_range_in_a_plan_are_refused() -> None:
    data = Plan("llama", MoEConfig(4, 2), ()).to_dict()
    data["config"]["top_k"] = 5
    with pytest.raises(ConfigError, match="top_k is 5"):
        Plan.from_json(json.dumps(data))


def test_every_name_of_a_plan_is_renamed_and_what_is_not_there_is_left_out() -> None:
    site = Plan.from_json(json.dumps({**Plan("llama", MoEConfig(4, 2), ()).to_dict(), "sites": [SITE]})).sites[0]
    rows = Rows("a.up", "a.b", 0, 3, 1, 3, False)
    whole = replace(site, path="a", bypassed=("a.x",), handing=("a.h",), ups=(rows,), down=replace(rows, bias=None),
                    activation_state=(("a.s", "weight"),))  # fmt: skip
    plan = Plan("llama", MoEConfig(4, 2), (replace(whole, path="gone"), whole))
    moved = plan.renamed(lambda name: None if name == "gone" else f"m.{name}")
    rows = replace(rows, parameter="m.a.up", bias="m.a.b")
    there = replace(site, path="m.a", bypassed=("m.a.x",), handing=("m.a.h",), ups=(rows,),
                    down=replace(rows, bias=None), activation_state=(("m.a.s", "weight"),))  # fmt: skip
    assert moved == replace(plan, sites=(there,))
