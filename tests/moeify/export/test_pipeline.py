from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from torch import Tensor, nn

import moeify
from benchmarks.gpu.onnx.rules import copies
from moeify.errors import RefusedError, VerificationError
from moeify.export import pipeline
from moeify.export.capture import trace
from moeify.export.capture.interface import FlatModel, Interface
from moeify.export.lower import functions, layers
from moeify.measure import TOLERANCE
from moeify.runtime.session import open_session
from tests.moeify import tiny

tf: Any = transformers


@pytest.fixture(scope="module")
def moe() -> nn.Module:
    return tiny.differing_moe()


@pytest.fixture(scope="module")
def exported(moe: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, moeify.OnnxReport]:
    path = tmp_path_factory.mktemp("decoder") / "model.onnx"
    return path, moeify.export_onnx(moe, path)


def test_a_decoder_has_the_names_that_users_expect(exported: tuple[Path, moeify.OnnxReport]) -> None:
    graph = onnx.load(exported[0]).graph
    states = [f"{layer}.{part}" for layer in range(tiny.LAYERS) for part in ("key", "value")]
    assert [value.name for value in graph.input] == [
        "input_ids", "attention_mask", "position_ids", *(f"past_key_values.{state}" for state in states)
    ]  # fmt: skip
    assert [value.name for value in graph.output] == ["logits", *(f"present.{state}" for state in states)]
    assert [d.dim_param for d in graph.input[0].type.tensor_type.shape.dim] == ["batch", "sequence"]


def test_checker_and_shape_inference_accept_the_file(exported: tuple[Path, moeify.OnnxReport]) -> None:
    model = onnx.load(exported[0])
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert {o.domain: o.version for o in model.opset_import} == {"": 20, "moeify": 1}
    assert [f.name for f in model.functions] == ["SparseMoE"]


def test_the_report_says_what_was_measured(exported: tuple[Path, moeify.OnnxReport]) -> None:
    report = exported[1]
    assert report.passed and 0 < report.relative < report.tolerance == 1e-5
    assert report.operators["moeify::SparseMoE"] == tiny.LAYERS
    metadata = {entry.key: entry.value for entry in onnx.load(exported[0]).metadata_props}
    assert metadata["moeify.target"] == "cpu" and metadata["moeify.onnxruntime"] == report.requires


def test_a_stock_moe_for_cuda_waits_for_nothing_that_only_the_device_knows(tmp_path: Path) -> None:
    report = moeify.export_onnx(tiny.mixtral(intermediate_size=24), tmp_path / "mixtral.onnx", "cuda")
    assert report.passed and report.operators["com.microsoft::MoE"] == 1 and report.requires == "1.28"
    assert not {"NonZero", "Split", "If", "Loop", "GatherND"} & report.operators.keys()
    graph: Any = onnx.load(tmp_path / "mixtral.onnx").graph
    assert copies(graph) == [], "a copy between CPU and GPU forbids a CUDA graph"
    makers = {name: node for node in graph.node for name in node.output}
    assert any(
        makers[node.input[0]].op_type == "Squeeze" and makers[node.input[1]].op_type == "Add"
        for node in graph.node
        if node.op_type == "Range" and node.input[0] in makers
    ), "positions are Range(past, past + length)"


class Choosing(nn.Module):
    """Takes the largest, as a router does before its softmax."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x.topk(2, -1).values.softmax(-1)
        return y


def test_the_file_that_is_written_is_loaded_and_not_only_its_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"x": torch.randn(4, 3, 7).bfloat16()}
    assert moeify.export_onnx(
        nn.Sequential(nn.Linear(7, 7), Choosing()).bfloat16(),
        tmp_path / "net.onnx",
        "portable",
        example_inputs={"input": inputs["x"]},
    ).passed
    monkeypatch.setattr(layers, "widen_undefined", lambda model: None)
    model = nn.Sequential(nn.Linear(7, 7), Choosing()).bfloat16()
    with pytest.raises(VerificationError, match=r"not one that ONNX Runtime loads: .*TopK.*; nothing was written$"):
        moeify.export_onnx(model, tmp_path / "x.onnx", "portable", example_inputs={"input": inputs["x"]})
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_a_rounded_graph_is_held_to_pytorch_with_the_same_rounded_weights(tmp_path: Path) -> None:
    model = tiny.mixtral()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = moeify.export_onnx(model, tmp_path / "mixtral.onnx", quantize="int4")
    assert report.passed and report.relative < 1e-5 < (report.rounding or 0) < 0.5
    (node,) = [node for node in onnx.load(tmp_path / "mixtral.onnx").graph.node if node.op_type == "QMoE"]
    assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_encoder_of_two_outputs(tmp_path: Path) -> None:
    sizes = {"hidden_size": 36, "intermediate_size": 57, "num_hidden_layers": 1, "num_attention_heads": 3}
    model = moeify.convert(tf.BertModel(tf.BertConfig(vocab_size=101, **sizes)).eval(), moeify.MoEConfig(3, 2))
    report = moeify.export_onnx(model, tmp_path / "bert.onnx", "portable")
    graph = onnx.load(tmp_path / "bert.onnx").graph
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [value.name for value in graph.output] == ["last_hidden_state", "pooler_output"]
    shapes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.output]
    assert shapes == [["batch", "sequence", 36], ["batch", 36]]
    assert report.passed


def test_an_encoder_decoder_takes_padding_and_targets_of_another_length(tmp_path: Path) -> None:
    sizes = {"d_model": 36, "d_kv": 12, "d_ff": 57, "num_heads": 3, "num_layers": 1, "num_decoder_layers": 1}
    config = tf.T5Config(vocab_size=101, feed_forward_proj="gated-gelu", decoder_start_token_id=0, **sizes)
    model = moeify.convert(tf.T5ForConditionalGeneration(config).eval(), moeify.MoEConfig(3, 2))
    assert moeify.export_onnx(model, tmp_path / "t5.onnx").passed
    shapes = {
        value.name: [d.dim_param for d in value.type.tensor_type.shape.dim]
        for value in onnx.load(tmp_path / "t5.onnx").graph.input
    }
    assert shapes == {
        "input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"],
        "decoder_input_ids": ["batch", "decoder_sequence"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings"), [("bert", moeify.MoEConfig.expert_choice(4)), ("llama", moeify.MoEConfig.switch(4))]
)
def test_tokens_that_compete_for_experts_do_so_in_every_shape(
    tmp_path: Path, name: str, settings: moeify.MoEConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What overflows depends on the number of tokens, and in a decoder on how they come."""
    monkeypatch.setitem(tiny._SIZES if name == "bert" else tiny._LLAMA, "num_hidden_layers", 1)
    model = moeify.convert(tiny.build(name), settings)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert moeify.export_onnx(model, tmp_path / "model.onnx").passed


def test_a_capacity_that_keeps_tokens_at_random_is_refused(tmp_path: Path) -> None:
    settings = moeify.MoEConfig(4, 2, eval_capacity_factor=1.0, drop_order="random")
    model = moeify.convert(tiny.build("llama"), settings)
    with pytest.raises(RefusedError, match=r"^model.layers.0.mlp draws at random .*set_capacity\(model, None\)"):
        moeify.export_onnx(model, tmp_path / "model.onnx")


def test_experts_that_are_quantized_for_pytorch_are_refused(tmp_path: Path) -> None:
    model = moeify.quantize_experts(moeify.convert(tiny.build("llama"), moeify.MoEConfig(4, 2)), "fp8")
    with pytest.raises(
        RefusedError, match=r"^model.layers.0.mlp.experts is quantized by .* export the model as it was"
    ):
        moeify.export_onnx(model, tmp_path / "model.onnx")


class FFN(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor], bias: bool) -> None:
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(7, 11, bias), nn.Linear(11, 7, bias), activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.activation(self.up(x)))
        return y


class Net(nn.Module):
    """Not from transformers; its experts have an activation that nobody named."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = lambda z: torch.sin(z) * 2, bias: bool = True) -> None:
        super().__init__()
        self.ffn = FFN(activation, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.ffn(x)
        return y


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_of_ones_own_with_an_activation_of_ones_own(tmp_path: Path, bias: bool) -> None:
    inputs = {"x": torch.randn(4, 3, 7)}
    model = moeify.convert(Net(bias=bias).eval(), moeify.MoEConfig(3, 2), example_inputs=inputs)
    report = moeify.export_onnx(model, tmp_path / "net.onnx", example_inputs=inputs)
    assert report.passed and report.operators["moeify::GroupedLinear"] == 2
    with pytest.raises(RefusedError, match=r"^ffn.experts \(.*\) cannot become .*no name for"):
        moeify.export_onnx(model, tmp_path / "cuda.onnx", "cuda", example_inputs=inputs)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_a_wrong_graph_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = functions.activate
    monkeypatch.setattr(functions, "activate", lambda tape, name, x, dtype: right(tape, "relu", x, dtype))
    inputs = {"x": torch.randn(4, 3, 7)}
    model = moeify.convert(Net(nn.functional.silu).eval(), moeify.MoEConfig(3, 2), example_inputs=inputs)
    with pytest.raises(VerificationError, match=r"differs from PyTorch.*nothing was written"):
        moeify.export_onnx(model, tmp_path / "net.onnx", example_inputs=inputs)
    assert not list(tmp_path.iterdir())


def test_ids_of_no_expert_are_left_to_the_operator(exported: tuple[Path, moeify.OnnxReport]) -> None:
    _, report = exported
    assert not {"Less", "GreaterOrEqual", "Or"} & report.operators.keys(), "the layer masks ids that it made itself"


def test_standard_operators_in_half_precision_are_for_any_gpu(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(4, 3, 7)}
    model = moeify.convert(Net(nn.functional.gelu).eval(), moeify.MoEConfig(3, 2), example_inputs=inputs)
    want = model(**inputs).detach()
    report = moeify.export_onnx(
        model.half(), tmp_path / "net.onnx", "portable", example_inputs={"x": inputs["x"].half()}
    )
    assert report.passed and report.dtype == "float16"
    session = open_session(tmp_path / "net.onnx", provider="cpu")
    (got,) = session.run(None, {"x": inputs["x"].half().numpy()})
    assert got.dtype == "float16"
    assert (torch.from_numpy(got).float() - want).abs().max() <= TOLERANCE["float16"] * want.abs().max()


class Drawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_a_model_that_draws_random_numbers_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"^Drawing draws random numbers"):
        moeify.export_onnx(Drawing(), tmp_path / "net.onnx", example_inputs={"x": torch.randn(4, 7)})


def test_half_precision_is_traced_once_and_leaves_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced, right = [], trace._trace

    def counted(module: FlatModel, interface: Interface) -> torch.export.ExportedProgram:
        traced.append(module)
        return right(module, interface)

    monkeypatch.setattr(trace, "_trace", counted)
    inputs = {"x": torch.randn(4, 3, 7).bfloat16()}
    model = Net(nn.functional.silu).bfloat16().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = moeify.export_onnx(model, tmp_path / "net.onnx", "portable", example_inputs=inputs)
    assert report.passed and report.dtype == "bfloat16" and len(traced) == 1
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert onnx.load(tmp_path / "net.onnx").graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


def test_the_float32_twin_is_gone_before_onnx_runtime_holds_its_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.mixtral(intermediate_size=24).to(torch.float16)
    weights: list[Any] = []
    write_exact = pipeline._Export._write_exact

    def spy(self: Any, twin: nn.Module, captured: Any) -> Any:
        weights.extend(map(weakref.ref, twin.parameters()))
        return write_exact(self, twin, captured)

    def opened(path: Path, **kwargs: Any) -> Any:
        assert weights and all(weight() is None for weight in weights)
        return open_session(path, **kwargs)

    monkeypatch.setattr(pipeline._Export, "_write_exact", spy)
    monkeypatch.setattr(pipeline, "open_session", opened)
    assert moeify.export_onnx(model, tmp_path / "mixtral.onnx", "cuda").passed
