from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from torch import Tensor, nn

import moeify
from moeify.errors import VerificationError
from moeify.export.capture.interface import FlatModel, choose_interface
from moeify.export.lower import standard
from moeify.export.lower.weights import unstacked
from moeify.export.prove import Case, Difference, compare, expected_cases, rounded_weights
from tests.moeify import tiny

tf: Any = transformers

WANT = {"large": torch.tensor([[100.0, -50.0], [1.0, 2.0]]), "small": torch.tensor([[3e-6, 4e-6]])}


class Session:
    """Gives fixed outputs, as an `onnxruntime.InferenceSession` does."""

    def __init__(self, outputs: dict[str, torch.Tensor]) -> None:
        self.outputs = outputs

    def get_inputs(self) -> list[Any]:
        return []

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.outputs]

    def run(self, names: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [tensor.numpy() for tensor in self.outputs.values()]


def measured(**outputs: torch.Tensor) -> Difference:
    interface: Any = None  # read for keys and values only
    return compare(Session({**WANT, **outputs}), interface, [Case("one", {}, (), None, WANT)])


def test_the_same_outputs_do_not_differ() -> None:
    assert measured() == Difference(0.0, 0.0, 0.0, 1.0, ("one",))


def test_a_small_output_is_not_hidden_by_a_large_one() -> None:
    difference = measured(small=torch.tensor([[3e-6, 0.0]]))
    assert difference.max_abs_diff == pytest.approx(4e-6)
    assert difference.relative == pytest.approx(1.0)
    assert difference.rms == pytest.approx(0.8)
    assert difference.top1_agreement == pytest.approx(2 / 3)


def test_a_value_that_is_no_number_is_the_largest_difference() -> None:
    for bad in (math.nan, math.inf):
        difference = measured(large=torch.tensor([[100.0, bad], [1.0, 2.0]]))
        assert not math.isfinite(difference.relative)


def test_padding_does_not_count() -> None:
    live = torch.tensor([[True, False]])
    want = {"tokens": torch.tensor([[[1.0], [2.0]]]), "pooled": torch.tensor([[3.0, 4.0]])}
    case = Case("one", {}, (), live, want)
    interface: Any = None
    assert compare(Session({**want, "tokens": torch.tensor([[[1.0], [9.0]]])}), interface, [case]).relative == 0
    assert compare(Session({**want, "tokens": torch.tensor([[[9.0], [2.0]]])}), interface, [case]).relative > 1
    assert compare(Session({**want, "pooled": torch.tensor([[3.0, 9.0]])}), interface, [case]).relative > 1


def test_a_graph_that_does_not_run_is_one_line() -> None:
    class Failing(Session):
        def run(self, names: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Non-zero status code\nmore")

    interface: Any = None
    with pytest.raises(VerificationError, match=r"cannot run the exported graph on one: .* status code$"):
        compare(Failing({}), interface, [Case("one", {}, (), None, WANT)])


def test_an_output_of_another_shape_is_one_line() -> None:
    with pytest.raises(VerificationError, match=r"gives small of shape \(2, 1\), and PyTorch of \(1, 2\), on one$"):
        measured(small=torch.zeros(2, 1))


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A converted Llama of one layer, whose experts and routers differ."""
    monkeypatch.setitem(tiny._LLAMA, "num_hidden_layers", 1)
    return tiny.differing_moe()


def without_padding(given: dict[str, Tensor]) -> None:
    given["attention_mask"] = torch.ones_like(given["attention_mask"])


def positions_of_each_piece(given: dict[str, Tensor]) -> None:
    given["position_ids"] = given["position_ids"] - given["past_key_values.0.key"].shape[2]


def keys_without_values(given: dict[str, Tensor]) -> None:
    given["past_key_values.0.value"] = torch.zeros_like(given["past_key_values.0.value"])


def keys_in_another_order(given: dict[str, Tensor]) -> None:
    given["past_key_values.0.key"] = given["past_key_values.0.key"].flip(2)


@pytest.mark.parametrize(
    "broken", [without_padding, positions_of_each_piece, keys_without_values, keys_in_another_order]
)
def test_an_export_with_a_wrong_mask_position_or_cache_is_refused(
    llama: nn.Module, tmp_path: Path, broken: Callable[[dict[str, Tensor]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is traced is not the model: only the proof can see it."""
    right = FlatModel.forward

    def forward(self: FlatModel, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        broken(given)
        return right(self, *given.values())

    monkeypatch.setattr(FlatModel, "forward", forward)
    with pytest.raises(VerificationError, match="the exported graph differs from PyTorch"):
        moeify.export_onnx(llama, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_export_with_exchanged_experts_is_refused(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rotated(graph: ir.Graph, value: ir.Value) -> list[ir.Value]:
        first, *others = unstacked(graph, value)
        return [*others, first]

    monkeypatch.setattr(standard, "unstacked", rotated)
    with pytest.raises(VerificationError, match="the exported graph differs from PyTorch"):
        moeify.export_onnx(llama, tmp_path / "model.onnx")


def test_an_error_with_a_cache_that_pytorch_shares_is_refused(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is one forward without a cache."""
    right = tf.LlamaForCausalLM.forward

    def forward(self: nn.Module, *args: Any, use_cache: bool, **kwargs: Any) -> Any:
        output = right(self, *args, use_cache=use_cache, **kwargs)
        output.logits = output.logits * (1.01 if use_cache else 1.0)
        return output

    forward.__signature__ = inspect.signature(right)  # type: ignore[attr-defined]
    monkeypatch.setattr(tf.LlamaForCausalLM, "forward", forward)
    with pytest.raises(VerificationError, match="the exported graph differs from PyTorch"):
        moeify.export_onnx(llama, tmp_path / "model.onnx")


def test_a_decoder_is_proved_in_pieces_and_with_padding(llama: nn.Module) -> None:
    cases = expected_cases(llama, choose_interface(llama, None))
    assert [case.label for case in cases] == ["1 x 1+1+1", "2 x 7+1+3", "3 x 5+1+1 padded"]
    padded = cases[-1]
    assert padded.live is not None and padded.live.sum(-1).tolist() == [4, 7, 7]
    assert padded.inputs["position_ids"][0].tolist() == [0, 0, 0, 0, 1, 2, 3]


def test_integers_of_a_model_without_a_vocabulary_are_those_of_the_example() -> None:
    class Categories(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 2)

        def forward(self, kinds: Tensor) -> Tensor:
            y: Tensor = self.table(kinds)
            return y

    model = Categories()
    interface = choose_interface(model, {"kinds": torch.tensor([[0, 2]])})
    drawn = torch.cat([case.inputs["kinds"].flatten() for case in expected_cases(model, interface)])
    assert sorted(set(drawn.tolist())) == [0, 1, 2]


def test_the_largest_integer_of_a_model_without_a_vocabulary_is_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Last(nn.Module):
        def forward(self, kinds: Tensor) -> Tensor:
            return (kinds == 2).float()

    right = FlatModel.forward
    monkeypatch.setattr(FlatModel, "forward", lambda self, *kinds: right(self, kinds[0].clamp(max=1)))
    with pytest.raises(VerificationError, match="the exported graph differs from PyTorch"):
        moeify.export_onnx(Last(), tmp_path / "x.onnx", example_inputs={"kinds": torch.tensor([[0, 2], [1, 0]])})


def test_rounded_weights_are_there_only_while_a_module_runs() -> None:
    first, x = nn.Linear(2, 2), torch.ones(1, 2)
    exact = first.weight.detach().clone()
    with torch.no_grad(), rounded_weights(nn.Sequential(first), {"0.weight": lambda: torch.zeros(2, 2)}):
        assert torch.equal(first(x)[0], first.bias)
        assert torch.equal(first.weight, exact)
    assert torch.equal(first(x), nn.functional.linear(x, exact, first.bias))


def test_a_model_keeps_its_weights_when_a_forward_raises() -> None:
    first = nn.Linear(2, 2)
    model, exact = nn.Sequential(first), first.weight.detach().clone()
    with (
        pytest.raises(RuntimeError, match="cannot be multiplied"),
        rounded_weights(model, {"0.weight": lambda: torch.zeros(2, 2)}),
    ):
        model(torch.ones(1, 3))
    assert torch.equal(first.weight, exact)


def test_a_model_keeps_its_weights_when_the_proof_of_a_rounded_export_raises(tmp_path: Path) -> None:
    model = tiny.mixtral()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experts = model.model.layers[0].mlp.experts

    def fail(*_: object) -> None:
        if torch.compiler.is_exporting():
            return
        if not torch.equal(experts.down_proj, before["model.layers.0.mlp.experts.down_proj"]):
            raise ZeroDivisionError

    experts.act_fn.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        moeify.export_onnx(model, tmp_path / "mixtral.onnx", quantize="int8")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not list(tmp_path.iterdir())
