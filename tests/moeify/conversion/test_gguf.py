"""A GGUF file holds the numbers of the native folder, in llama.cpp's order; both are read here by other means."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import Callbacks, Output, convert_checkpoint, plan_checkpoint
from moeify.conversion.dense import DenseCheckpoint
from moeify.conversion.gguf import GgufOutput, convert_to_gguf
from moeify.errors import CheckpointError, RefusedError
from tests.moeify import tiny
from tests.moeify.families.gguf_files import in_pairs, key

tf: Any = transformers
EXPERTS = 4
NOISE = MoEConfig(EXPERTS, 2, granularity=1, method="noise")
SHARDS = MoEConfig(EXPERTS, 2, granularity=2)
PROOF = {"made up": True}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
         "max_position_embeddings": 256}  # fmt: skip
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64, "rope_theta": 10000.0}  # fmt: skip
DENSE: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA_3)
    ).bfloat16(),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, head_dim=32)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SIZES, attention_multiplier=0.2)),
}


@dataclass(frozen=True)
class Case:
    """A dense checkpoint, opened and traced once."""

    dense: DenseCheckpoint
    folder: Path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    kept: dict[str, Case] = {}

    def opened(name: str) -> Case:
        if name not in kept:
            torch.manual_seed(0)
            model: Any = DENSE[name]()
            for parameter in model.parameters():
                nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
            folder = tiny.save(model, tmp_path_factory.mktemp(name) / "dense")
            kept[name] = Case(DenseCheckpoint(open_source(folder)), folder)
        return kept[name]

    yield opened


def both(case: Case, target: str, config: MoEConfig, place: Path, kind: str | None = None) -> tuple[Any, Any, Any]:
    """The GGUF file, and the native folder's tensors and config."""
    plan = plan_checkpoint(case.dense, config, target=target, gguf=True)
    convert_to_gguf(case.dense, plan, GgufOutput(place / "moe.gguf", kind), Callbacks(check=lambda _: PROOF))
    convert_checkpoint(case.dense, plan, Output(place / "moe", 10**9))
    native = {name: tensor.float().numpy() for name, tensor in load_file(place / "moe" / "model.safetensors").items()}
    return gguf.GGUFReader(place / "moe.gguf"), native, json.loads((place / "moe" / "config.json").read_text())


def tensors(reader: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(tuple(t.shape)[::-1]) for t in reader.tensors}


# Names at llama.cpp by names in the family; experts are looked for by their number.
ATTENTION = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm"}  # fmt: skip
QWEN = {"ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
        "ffn_down_exps": "mlp.experts.{}.down_proj", "ffn_gate_inp": "mlp.gate"}  # fmt: skip
SHARED = {f"ffn_{name}_shexp": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
NAMES = {
    "mixtral": {"ffn_gate_exps": "block_sparse_moe.experts.{}.w1", "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
                "ffn_down_exps": "block_sparse_moe.experts.{}.w2", "ffn_gate_inp": "block_sparse_moe.gate",
                "ffn_norm": "post_attention_layernorm"},
    "qwen3_moe": {**QWEN, "ffn_norm": "post_attention_layernorm", "attn_q_norm": "self_attn.q_norm",
                  "attn_k_norm": "self_attn.k_norm"},
    "glm4_moe": {**QWEN, **SHARED, "post_attention_norm": "post_attention_layernorm"},
}  # fmt: skip
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@pytest.mark.parametrize(
    ("source", "target", "config"),
    [("llama", "mixtral", NOISE), ("llama", "mixtral", SHARDS), ("qwen3", "qwen3_moe", NOISE),
     ("qwen2", "glm4_moe", NOISE)],
)  # fmt: skip
def test_the_numbers_are_those_of_the_native_folder(
    source: str, target: str, config: MoEConfig, case: Callable[[str], Case], tmp_path: Path
) -> None:
    reader, native, _ = both(case(source), target, config, tmp_path)
    found, expected = tensors(reader), {f"{name}.weight": native[f"{there}.weight"] for name, there in WHOLE.items()}
    for layer in range(SIZES["num_hidden_layers"]):
        for name, there in {**ATTENTION, **NAMES[target]}.items():
            path = f"model.layers.{layer}.{there}.weight"
            if "{}" in path:
                expected[f"blk.{layer}.{name}.weight"] = np.stack([native[path.format(e)] for e in range(EXPERTS)])
            else:
                heads = {"attn_q": 4, "attn_k": 2}.get(name, 0) * (target == "mixtral")
                expected[f"blk.{layer}.{name}.weight"] = in_pairs(native[path], heads) if heads else native[path]
        if target == "glm4_moe":
            bias = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
            expected[f"blk.{layer}.exp_probs_b.bias"] = native[bias]
            for name in "qkv":
                expected[f"blk.{layer}.attn_{name}.bias"] = native[f"model.layers.{layer}.self_attn.{name}_proj.bias"]
    if target == "mixtral":
        expected["rope_freqs.weight"] = found["rope_freqs.weight"]  # of the config, see tests/moeify/families
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_fused_experts_come_apart_and_shared_ones_too(case: Callable[[str], Case], tmp_path: Path) -> None:
    config = MoEConfig(EXPERTS, 2, method="noise", shared_experts=1)
    reader, native, _ = both(case("granite"), "granitemoeshared", config, tmp_path)
    found, size = tensors(reader), SIZES["intermediate_size"]
    for layer in range(SIZES["num_hidden_layers"]):
        for path, name in (("block_sparse_moe", "exps"), ("shared_mlp", "shexp")):
            fused = native[f"model.layers.{layer}.{path}.input_linear.weight"]
            np.testing.assert_array_equal(found[f"blk.{layer}.ffn_gate_{name}.weight"], fused[..., :size, :])
            np.testing.assert_array_equal(found[f"blk.{layer}.ffn_up_{name}.weight"], fused[..., size:, :])
    assert key(reader, "granitemoe.attention.scale") == pytest.approx(0.2)


def test_what_the_file_says_of_the_model(case: Callable[[str], Case], tmp_path: Path) -> None:
    reader, _, config = both(case("qwen3"), "auto", NOISE, tmp_path)
    assert key(reader, "general.architecture") == "qwen3moe"
    assert key(reader, "general.name") == "Moe" and key(reader, "general.type") == "model"
    said = {"block_count": 3, "embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2,
            "attention.key_length": 32, "expert_count": EXPERTS, "expert_used_count": 2, "context_length": 256,
            "expert_feed_forward_length": 96}  # fmt: skip
    assert {name: key(reader, f"qwen3moe.{name}") for name in said} == said
    assert key(reader, "qwen3moe.rope.freq_base") == config["rope_theta"]
    assert key(reader, "general.file_type") == gguf.LlamaFileType.ALL_F32
    record = json.loads(key(reader, "moeify.json"))
    assert record["target"] == "qwen3_moe" and record["verification"] == PROOF
    assert key(reader, "tokenizer.ggml.model") == "none" and key(reader, "qwen3moe.vocab_size") == 96


@pytest.mark.parametrize("kind", [None, "F32", "F16", "Q8_0"])
def test_types(kind: str | None, case: Callable[[str], Case], tmp_path: Path) -> None:
    """Matrices are rounded to the type; routers, norms and biases are what they were."""
    plan = plan_checkpoint(case("llama").dense, MoEConfig(EXPERTS, 2), gguf=True)
    convert_to_gguf(case("llama").dense, plan, GgufOutput(tmp_path / "moe.gguf", kind), Callbacks())
    reader = gguf.GGUFReader(tmp_path / "moe.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_down_exps.weight"] == kinds["token_embd.weight"] == (kind or "BF16")
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["output_norm.weight"] == "F32"
    down = load_file(case("llama").folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].float().numpy()
    step = {"F16": 2**-24, "Q8_0": np.abs(down).max() / 127}.get(str(kind), 0)
    found = tensors(reader)["blk.1.ffn_down_exps.weight"]
    assert found.shape == (EXPERTS, 64, 96)
    for expert in found:
        assert np.abs(expert - down).max() <= step


def test_what_a_file_cannot_hold_is_refused(case: Callable[[str], Case], tmp_path: Path) -> None:
    dense, callbacks = case("qwen3").dense, Callbacks()
    narrow = plan_checkpoint(dense, MoEConfig(EXPERTS, 2, granularity=2), gguf=True)  # 96 / 2 is no multiple of 32
    with pytest.raises(RefusedError, match=r"q8_0 has blocks of 32 values, and blk\.0\.ffn_down_exps\.weight has rows"):
        convert_to_gguf(dense, narrow, GgufOutput(tmp_path / "moe.gguf", "Q8_0"), callbacks)
    some = plan_checkpoint(dense, NOISE, "1", "qwen3_moe", gguf=True)
    with pytest.raises(RefusedError, match=r"qwen3moe has no place for model\.layers\.0\.mlp\.down_proj\.weight"):
        convert_to_gguf(dense, some, GgufOutput(tmp_path / "moe.gguf"), callbacks)
    for target, reason in (("moeify", "cannot hold the moeify format"), ("mellum", "is not written as GGUF: choose")):
        with pytest.raises(RefusedError, match=reason):
            plan_checkpoint(dense, NOISE, target=target, gguf=True)
    with pytest.raises(RefusedError, match="as many key heads as query heads"):
        plan_checkpoint(dense, NOISE, target="dots1", gguf=True)
    assert list(tmp_path.iterdir()) == []


def test_auto_takes_what_llama_cpp_computes(case: Callable[[str], Case]) -> None:
    """It does not renormalize in Qwen2-MoE, which is written when it is asked for."""
    for layers, wanted, target in (("all", "auto", "glm4_moe"), ("all", "qwen2_moe", "qwen2_moe")):
        assert plan_checkpoint(case("qwen2").dense, NOISE, layers, wanted, gguf=True).target == target
    with pytest.raises(RefusedError, match="no family that is written as GGUF is exact for this qwen2"):
        plan_checkpoint(case("qwen2").dense, NOISE, "0,2", gguf=True)


def test_nothing_is_left_of_a_conversion_that_fails(case: Callable[[str], Case], tmp_path: Path) -> None:
    def stop(folder: Path) -> object:
        names = load_file(folder / "model.safetensors").keys()
        assert "model.layers.1.mlp.experts.3.up_proj.weight" in names and "lm_head.weight" in names
        assert not any(name.startswith("model.layers.2.") for name in names)  # the slice that is proven, no more
        raise CheckpointError("stopped")

    dense = case("qwen3").dense
    plan = plan_checkpoint(dense, NOISE, gguf=True)
    with pytest.raises(CheckpointError, match="stopped"):
        convert_to_gguf(dense, plan, GgufOutput(tmp_path / "moe.gguf"), Callbacks(check=stop))
    with pytest.raises(CheckpointError, match="overlap"):
        convert_to_gguf(dense, plan, GgufOutput(case("qwen3").folder / "moe.gguf"), Callbacks())
    assert list(tmp_path.iterdir()) == []
