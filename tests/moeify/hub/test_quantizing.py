"""Quantized experts: of a live model, on the way from a file, as they are stored; saved, loaded again, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moeify
from moeify.config import MoEConfig
from moeify.contract.found import find_layers
from moeify.errors import CheckpointError, ConfigError, MoeifyError, RefusedError
from moeify.kernels.quantized import dequantize
from moeify.layers import Experts
from moeify.layers.quantized_experts import QuantizedExperts
from moeify.measure import TOLERANCE, relative_difference
from moeify.plan import ASK_FOR_MOEIFY
from tests.moeify import tiny
from tests.moeify.checkpoint.quantized.make import packed
from tests.moeify.command import moeify_command

tf: Any = transformers
_SIZES = {"vocab_size": 101, "hidden_size": 160, "intermediate_size": 72, "num_hidden_layers": 1,
          "num_attention_heads": 4, "num_key_value_heads": 1, "num_experts_per_tok": 2, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def mixtral() -> Any:
    torch.manual_seed(0)
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**_SIZES, num_local_experts=3)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.set_experts_implementation("eager")
    return model


def converted() -> Any:
    """Experts that differ, with shared ones beside them and biases."""
    model = moeify.convert(tiny.build("gpt2"), MoEConfig(4, 2, method="noise", shared_experts=1))
    return model.eval()


MODELS: dict[str, Callable[[], Any]] = {"mixtral": mixtral, "converted": converted}


def quantized(model: nn.Module) -> list[QuantizedExperts]:
    return [module for module in model.modules() if isinstance(module, QuantizedExperts)]


def made_whole(model: nn.Module) -> list[Tensor]:
    return [dequantize(weight, torch.float64) for module in quantized(model) for weight in module.weights]


def stacked(model: nn.Module) -> list[Tensor]:
    kinds = (Experts, tf.models.mixtral.modeling_mixtral.MixtralExperts)
    found = [module for module in model.modules() if isinstance(module, kinds)]
    return [p.detach().double() for module in found for p in module.parameters() if p.dim() == 3]


@pytest.mark.parametrize(("name", "form"), [("mixtral", "fp8"), ("mixtral", "int4"), ("converted", "fp8")])
def test_a_model_is_quantized_saved_loaded_and_speaks(name: str, form: str, tmp_path: Path) -> None:
    model, ids = MODELS[name](), {"input_ids": torch.randint(3, 101, (2, 7))}
    tiny.save(model, tmp_path / "whole")
    dense, sizes, weights = tiny.logits(model, "gpt2"), find_layers(model), stacked(model)
    assert moeify.quantize_experts(model, form) is model and not stacked(model)
    for got, want in zip(made_whole(model), weights, strict=True):  # in a block the largest number ends the range
        assert 0 < relative_difference(got, want) <= (1 / 14 if form == "int4" else 2**-4)
    logits = tiny.logits(model, "gpt2")
    assert 0 < tiny.relative(logits, dense) < (0.3 if form == "int4" else 0.15)
    assert [layer.intermediate for layer in find_layers(model).values()] == [s.intermediate for s in sizes.values()]
    model.save_pretrained(tmp_path / "small")
    config = json.loads((tmp_path / "small/config.json").read_text())
    assert config["experts_implementation"] == ASK_FOR_MOEIFY  # stops a transformers without this library
    again = moeify.load(tmp_path / "small")
    on_the_way = moeify.load(tmp_path / "whole", quantize_experts=form)
    again.save_pretrained(tmp_path / "twice")
    moeify.register()
    twice = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "twice").eval()
    for other in (again, on_the_way, twice):
        assert len(quantized(other)) == len(quantized(model)) and torch.equal(tiny.logits(other, "gpt2"), logits)
    speakers: list[Any] = [model, again]
    said = [each.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist() for each in speakers]
    assert said[0] == said[1]
    held = sum(tensor.nbytes for module in quantized(model) for tensor in module.buffers())
    assert held < sum(weight.numel() for weight in weights) * 4 * (0.2 if form == "int4" else 0.3)


def fp8_blocks(w: Tensor) -> dict[str, Tensor]:
    scales = torch.rand(-(-w.shape[0] // 128), -(-w.shape[1] // 128)) * 0.01 + 0.001
    each = scales.repeat_interleave(128, 0)[: len(w)].repeat_interleave(128, 1)[:, : w.shape[1]]
    return {"weight": (w / each).clamp(-448, 448).to(torch.float8_e4m3fn), "weight_scale_inv": scales}


def fp8_whole(w: Tensor) -> dict[str, Tensor]:
    return {"weight": (w / 0.01).to(torch.float8_e4m3fn), "weight_scale": torch.rand(1) + 0.5}


def compressed(w: Tensor) -> dict[str, Tensor]:
    (rows, columns), groups = w.shape, w.shape[1] // 32 if w.shape[1] % 32 == 0 else 1
    numbers, scales = torch.randint(0, 16, (rows, columns)), torch.rand(rows, groups) * 0.02 + 0.01
    return {"weight_packed": packed(numbers, 4, 1), "weight_shape": torch.tensor(w.shape), "weight_scale": scales}


def gptq(w: Tensor, zero: int = 7) -> dict[str, Tensor]:
    rows, columns = w.shape
    zeros, groups = torch.full((1, rows), zero), torch.zeros(columns, dtype=torch.int32)
    numbers, scales = torch.randint(0, 16, (columns, rows)), torch.rand(1, rows) * 0.02 + 0.01
    return {"qweight": packed(numbers, 4, 0), "scales": scales, "qzeros": packed(zeros, 4, 1), "g_idx": groups}


STORED: dict[str, tuple[str, dict[str, Any], Callable[[Tensor], dict[str, Tensor]]]] = {
    "fp8, blocks": ("fp8", {"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8_blocks),
    "fp8, one scale": ("fp8", {"quant_method": "fp8"}, fp8_whole),
    "compressed-tensors": (
        "int4",
        {"quant_method": "compressed-tensors", "config_groups": {"all": {"weights": {"num_bits": 4}}}},
        compressed,
    ),
    "gptq": ("int4", {"quant_method": "gptq", "bits": 4, "group_size": -1}, gptq),
}


def store(folder: Path, settings: object, quantize: Callable[[Tensor], dict[str, Tensor]]) -> Path:
    """A native MoE with quantized experts, and one projection of the attention."""
    mixtral().save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".experts." in name or "q_proj" in name:
            parts = quantize(tensor).items()
            tensors |= {name.removesuffix("weight") + end: part.contiguous() for end, part in parts}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


@pytest.mark.parametrize("name", STORED)
def test_experts_are_taken_as_they_are_stored(name: str, tmp_path: Path) -> None:
    form, settings, quantize = STORED[name]
    folder, other = store(tmp_path / "stored", settings, quantize), {"fp8": "int4", "int4": "fp8"}[form]
    full: Any = moeify.load(folder, dequantize=True)
    full.set_experts_implementation("eager")
    kept = moeify.load(folder, quantize_experts=form)
    for got, want in zip(made_whole(kept), stacked(full), strict=True):
        assert relative_difference(got, want) < 1e-7
    logits = tiny.logits(kept, "gpt2")
    assert tiny.relative(logits, tiny.logits(full, "gpt2")) < (TOLERANCE["float32"] if form == "int4" else 0.1)
    kept.save_pretrained(tmp_path / "again")
    assert torch.equal(tiny.logits(moeify.load(tmp_path / "again"), "gpt2"), logits)
    with pytest.raises(
        CheckpointError, match=r"experts.0.w1 is not stored as the kernels take .*: pass dequantize=True"
    ):
        moeify.load(folder, quantize_experts=other)
    with pytest.raises(CheckpointError, match=f"holds experts in '{form}', not in '{other}'"):
        moeify.load(tmp_path / "again", quantize_experts=other)
    assert quantized(moeify.load(folder, quantize_experts=other, dequantize=True))[0].form == other


def test_zero_points_are_not_for_the_kernels(tmp_path: Path) -> None:
    folder = store(tmp_path / "stored", STORED["gptq"][1], lambda w: gptq(w, 6))
    with pytest.raises(CheckpointError, match="it has zero points besides 8: pass dequantize=True"):
        moeify.load(folder, quantize_experts="int4")
    moeify.load(folder, quantize_experts="int4", dequantize=True)


def test_it_does_not_train_and_a_cast_leaves_the_numbers() -> None:
    model = moeify.quantize_experts(mixtral(), "int4")
    before = made_whole(model)
    model.to(torch.bfloat16)
    assert all(map(torch.equal, made_whole(model), before)) and model.dtype == torch.bfloat16
    loss = model(**tiny.inputs("gpt2")).logits.float().sum()
    with pytest.raises(RefusedError, match="no gradient: train the model as it was before"):
        loss.backward()


def refused(kind: type[MoeifyError], match: str, form: str, model: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kind, match=match) as caught:
        moeify.quantize_experts(model, form)
    assert "\n" not in str(caught.value) and model.state_dict().keys() == state.keys()


def test_what_cannot_be_quantized_is_refused_before_anything_changes() -> None:
    refused(ConfigError, "no format 'fp4' of quantized experts: expected fp8 or int4", "fp4", mixtral())
    refused(
        RefusedError, "down_proj has 57 columns, and int4 packs two in a byte: quantize to 'fp8'", "int4", converted()
    )
    refused(RefusedError, "has no stacked experts", "fp8", tiny.build("llama"))
    refused(RefusedError, r"or call moeify.stack if it is linear", "fp8", moeify.linearize(mixtral()))
    refused(RefusedError, "has no stacked experts", "fp8", moeify.quantize_experts(mixtral(), "fp8"))
    config = tf.GptOssConfig(**_SIZES, num_local_experts=3, head_dim=40, layer_types=["full_attention"])
    refused(RefusedError, "computes what the kernels of quantized experts do not", "fp8", tf.GptOssForCausalLM(config))


def test_files_of_quantized_experts_are_for_loading_alone(tmp_path: Path) -> None:
    moeify.quantize_experts(mixtral(), "fp8").save_pretrained(tmp_path / "small")
    result = moeify_command("inspect", tmp_path / "small")
    assert result.exit_code == 1 and "which moeify.load alone takes: start from the checkpoint before" in result.output
    file = tmp_path / "small/model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.block_sparse_moe.experts.down_proj_scale"
    for damaged, said in ((tensors[name][:2], "expected"), (None, "missing tensor")):
        changed = {**tensors, name: damaged} if damaged is not None else {k: v for k, v in tensors.items() if k != name}
        save_file({key: value.contiguous() for key, value in changed.items()}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=said):
            moeify.load(tmp_path / "small")
