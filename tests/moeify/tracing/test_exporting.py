from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch
import torch.fx.config as fx_config
from torch import Tensor, nn

from moeify.tracing import exporting
from moeify.tracing.exporting import (
    DataDependent,
    first_that_traces,
    quiet_where_undecided,
    run_without_values,
    to_meta,
)

X = torch.zeros(2, 3)
LINEAR = nn.Linear(3, 5, device="meta")


class Undecided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


def settings() -> tuple[bool, bool, bool]:
    stack_traces = getattr(fx_config, "do_not_emit_stack_traces", False)  # torch 2.11 has no such setting
    return torch.backends.mha.get_fastpath_enabled(), stack_traces, gc.isenabled()


def test_the_first_inputs_that_fit_are_taken() -> None:
    graph_module, _ = first_that_traces(LINEAR, [torch.zeros(2, 4), (X,), {"input": torch.zeros(7, 3)}])
    assert graph_module is not None
    (output,) = graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert output.meta["val"].shape == (2, 5)


def test_the_failure_is_that_of_the_first_inputs() -> None:
    graph_module, failure = first_that_traces(LINEAR, [torch.zeros(2, 4), {"wrong": X}])
    assert graph_module is None
    assert str(failure).startswith("torch.export cannot trace Linear: ") and "wrong" not in str(failure)
    assert str(failure.__cause__).split("\n")[0] in str(failure)
    graph_module, failure = first_that_traces(LINEAR, [])
    assert graph_module is None and "the inputs of Linear cannot be guessed" in str(failure)


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("inputs", [X, torch.zeros(2, 4)])
def test_settings_are_as_before(inputs: Tensor, collects: bool) -> None:
    (gc.enable if collects else gc.disable)()
    try:
        before = settings()
        first_that_traces(LINEAR, [inputs])
        assert settings() == before == (True, False, collects)
    finally:
        gc.enable()


def test_a_torch_without_the_setting_for_stack_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace()
    monkeypatch.setattr(exporting, "fx_config", config)
    graph_module, _ = first_that_traces(LINEAR, [X])
    assert graph_module is not None and vars(config) == {}


def test_stack_traces_are_not_collected() -> None:
    graph_module, _ = first_that_traces(LINEAR, [X])
    assert graph_module is not None
    collected = not hasattr(fx_config, "do_not_emit_stack_traces")
    assert any(node.stack_trace for node in graph_module.graph.nodes) == collected


def test_a_run_without_values_takes_one_way_and_raises_what_the_forward_raises() -> None:
    run_without_values(Undecided(), X)
    with pytest.raises(RuntimeError):
        run_without_values(LINEAR, torch.zeros(2, 4))


def test_an_undecided_forward_raises_an_error_of_its_own_inside_the_block() -> None:
    module = Undecided()
    with quiet_where_undecided(module), pytest.raises(DataDependent):
        torch.export.export(module, (X,), strict=False)
    assert "forward" not in vars(module)


def test_a_model_with_shared_modules_keeps_its_forward() -> None:
    one = nn.Linear(3, 3)
    module = nn.Sequential(one, one)
    with quiet_where_undecided(module):
        assert "forward" not in vars(module)


def test_parameters_stay_parameters_on_the_meta_device() -> None:
    frozen = to_meta(nn.Parameter(X, requires_grad=False))
    assert isinstance(frozen, nn.Parameter) and frozen.is_meta and not frozen.requires_grad
    plain = to_meta(X.long())
    assert isinstance(plain, Tensor) and plain.is_meta and plain.dtype is torch.int64
    assert to_meta("other") == "other"
