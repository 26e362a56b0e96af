"""Which bytes of the source an output tensor is, and what must be computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.activations import ACT2FN

import moeify
from moeify.checkpoint.shards import OutTensor
from moeify.checkpoint.source import Source, open_source
from moeify.checkpoint.tensor_info import torch_dtype
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import Output, convert_checkpoint, plan_checkpoint
from moeify.conversion.dense import DenseCheckpoint
from moeify.conversion.layout import fill_layer, layer_tensors
from moeify.conversion.output_tensors import output_tensors
from moeify.errors import CheckpointError
from moeify.layers.build import build_layer
from moeify.plan import Plan
from tests.moeify import tiny

CONFIG = MoEConfig(experts=3, top_k=2)


def described(source: Source, config: MoEConfig, dtype: str | None = None) -> dict[str, OutTensor]:
    dense = DenseCheckpoint(source)
    plan = plan_checkpoint(dense, config, target="moeify")
    return {tensor.name: tensor for tensor in output_tensors(dense, plan, dtype, lambda _: None)}


@pytest.mark.parametrize(
    ("name", "config", "dtype", "computed"),
    [
        ("llama", CONFIG, None, set()),
        ("phi3", CONFIG, None, set()),
        ("gpt_neox", CONFIG, None, set()),
        ("gpt2", CONFIG, None, {"up_proj", "down_proj"}),  # stored (in, out)
        ("llama", CONFIG, "BF16", {"gate_up_proj", "down_proj"}),
        ("gpt_neox", MoEConfig(6, 3, granularity=3), None, {"down_proj"}),
        ("gpt_neox", MoEConfig(3, 2, shared_experts=1), None, {"down_proj", "down_proj_bias"}),
        ("llama", MoEConfig(3, 2, method="noise"), None, {"gate_up_proj", "down_proj"}),
    ],
)
def test_bytes_are_copied_where_they_are_what_is_wanted(
    name: str, config: MoEConfig, dtype: str | None, computed: set[str], tmp_path: Path
) -> None:
    with open_source(tiny.save(tiny.build(name), tmp_path)) as source:
        experts = {key: tensor for key, tensor in described(source, config, dtype).items() if ".experts." in key}
    assert experts
    for key, tensor in experts.items():
        assert any(map(callable, tensor.parts)) == (key.rpartition(".")[2] in computed), key


def test_equal_experts_share_their_computation(tmp_path: Path) -> None:
    with open_source(tiny.save(tiny.build("gpt2"), tmp_path)) as source:
        shards = described(source, MoEConfig(6, 3, granularity=3))["transformer.h.0.mlp.experts.down_proj"]
        noisy = described(source, MoEConfig(4, 2, method="noise"))["transformer.h.0.mlp.experts.down_proj"]
    assert len(shards.parts) == 6 and len(set(shards.parts)) == 3 and shards.parts[:3] == shards.parts[3:]
    assert len(set(noisy.parts)) == 4


class Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the devices of what operators return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.devices.update(leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


def test_a_tensor_in_another_form_is_described_without_its_values(tmp_path: Path) -> None:
    with open_source(tiny.save(tiny.build("phi3"), tmp_path)) as source:
        dense = DenseCheckpoint(source)
        plan = plan_checkpoint(dense, CONFIG, target="mixtral")
        with Made() as made:
            named = {tensor.name for tensor in output_tensors(dense, plan, None, lambda _: None)}
    assert "model.layers.0.self_attn.q_proj.weight" in named, "phi3 stores q, k and v as one"
    assert made.devices == {"meta"}


def alternating(plan: Plan) -> Plan:
    """The plan of a model in whose fused weight gate and up rows alternate, with the gate first."""

    def change(site: Any) -> Any:
        both = site.ups[0].out_features
        return replace(site, ups=tuple(replace(up, start=i, stop=both, step=2) for i, up in enumerate(site.ups)))

    return replace(plan, sites=tuple(map(change, plan.sites)))


@pytest.mark.parametrize("config", [CONFIG, MoEConfig(6, 3, granularity=3), MoEConfig(4, 2, method="drop")])
def test_rows_that_alternate_are_taken_apart(config: MoEConfig, tmp_path: Path) -> None:
    model = tiny.build("phi3")
    with open_source(tiny.save(model, tmp_path / "src")) as source:
        dense = DenseCheckpoint(source)
        plan = alternating(plan_checkpoint(dense, config, target="moeify"))
        convert_checkpoint(dense, plan, Output(tmp_path / "moe", 10**9))
    written = load_file(tmp_path / "moe/model.safetensors")
    both = model.get_parameter("model.layers.1.mlp.gate_up_proj.weight")
    if config.granularity == 1 and config.method.exact:
        assert written["model.layers.1.mlp.experts.gate_up_proj"][2].equal(torch.cat([both[::2], both[1::2]]))
    for site in plan.sites:
        layer = build_layer(site, config, None, both)
        fill_layer(layer, layer_tensors(site, config), model.get_parameter)
        assert all(written[f"{site.path}.{name}"].equal(value) for name, value in layer.state_dict().items())


class Leaky(nn.Module):
    """Its slope is a buffer."""

    persistent = False

    def __init__(self) -> None:
        super().__init__()
        self.slope: torch.Tensor
        self.register_buffer("slope", torch.tensor(0.3), persistent=self.persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, self.slope * x)


class Saved(Leaky):
    persistent = True


@pytest.fixture
def leaky(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.setitem(ACT2FN, "leaky", Leaky)
    monkeypatch.setitem(ACT2FN, "saved", Saved)

    def make(activation: str) -> Any:
        sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 37, "vocab_size": 50, "num_hidden_layers": 2,
                                 "num_attention_heads": 2, "pad_token_id": 0}  # fmt: skip
        torch.manual_seed(0)
        return tiny.tf.LlamaForCausalLM(transformers.LlamaConfig(**sizes, hidden_act=activation)).eval()

    return make


def test_a_buffer_of_an_activation_comes_along(leaky: Callable[[str], Any], tmp_path: Path) -> None:
    model = leaky("saved")
    config = MoEConfig(3, 2, shared_experts=1)
    tiny.convert_files(tiny.save(model, tmp_path / "src"), tmp_path / "moe", config)
    loaded = moeify.load(tmp_path / "moe").state_dict()
    expected = moeify.convert(model, config).state_dict()
    assert {name for name in expected if name.endswith("slope")} == {
        f"model.layers.{layer}.mlp.{stack}.region.slope" for layer in range(2) for stack in ("experts", "shared_expert")
    }
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_an_unsaved_buffer_is_named_and_the_way_that_works(leaky: Callable[[str], Any], tmp_path: Path) -> None:
    model = leaky("leaky")
    src = tiny.save(model, tmp_path / "src")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.act_fn\.slope, which the checkpoint does not"):
        tiny.convert_files(src, tmp_path / "moe", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    ids = torch.arange(12).view(2, 6)
    expected = moeify.convert(model, CONFIG)(input_ids=ids).logits
    tiny.save(model, tmp_path / "moe")
    loaded: Any = moeify.load(tmp_path / "moe")
    assert torch.equal(loaded(input_ids=ids).logits, expected)


def test_weights_and_biases_of_two_dtypes_keep_them(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("gpt_neox"), tmp_path / "src")
    tensors = load_file(src / "model.safetensors")
    half = {name: value if name.endswith("bias") else value.bfloat16() for name, value in tensors.items()}
    save_file(half, src / "model.safetensors", {"format": "pt"})
    tiny.convert_files(src, tmp_path / "moe", MoEConfig(3, 2, shared_experts=1))
    written = load_file(tmp_path / "moe/model.safetensors")
    mlp = "gpt_neox.layers.1.mlp"
    assert written[f"{mlp}.experts.down_proj_bias"].dtype == torch.float32
    assert written[f"{mlp}.experts.up_proj_bias"][2].equal(tensors[f"{mlp}.dense_h_to_4h.bias"])
    assert written[f"{mlp}.experts.down_proj"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("narrow", "dtype", "written"),
    [("gate_proj", torch.float16, "F32"), ("up_proj", torch.bfloat16, "F32"), ("down_proj", torch.float16, "F16")],
)
def test_projections_of_two_dtypes_are_stored_in_the_wider_one(
    narrow: str, dtype: torch.dtype, written: str, tmp_path: Path
) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    tensors = load_file(src / "model.safetensors")
    mixed = {name: value.to(dtype) if narrow in name else value for name, value in tensors.items()}
    save_file(mixed, src / "model.safetensors", {"format": "pt"})
    tiny.convert_files(src, tmp_path / "moe", CONFIG, target="moeify")
    found = load_file(tmp_path / "moe/model.safetensors")
    mlp = "model.layers.1.mlp"
    both = torch.cat([mixed[f"{mlp}.{name}_proj.weight"].float() for name in ("gate", "up")])
    assert found[f"{mlp}.experts.gate_up_proj"][2].equal(both)
    assert found[f"{mlp}.experts.down_proj"].dtype == torch_dtype(written if narrow == "down_proj" else "F32")


def test_tensors_that_no_model_has_are_said(tmp_path: Path) -> None:
    said: list[str] = []
    with open_source(tiny.save(tiny.build("llama"), tmp_path)) as source:
        source.unused = ("rope_freqs.weight",)
        dense = DenseCheckpoint(source)
        list(output_tensors(dense, plan_checkpoint(dense, CONFIG), None, said.extend))
    assert said == ["rope_freqs.weight"]
