from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moeify
from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import Callbacks, Output
from moeify.conversion.dense import DenseCheckpoint
from moeify.errors import CheckpointError
from moeify.families.table import FAMILIES
from moeify.measure import TOLERANCE
from moeify.plan import Plan
from moeify.proving.proof import verify_slice
from tests.moeify import tiny

CONFIG = MoEConfig(experts=3, top_k=2)
TOLERANCE_FP32 = TOLERANCE["float32"]
NATIVE = [
    ("llama", "mixtral"),
    ("mistral", "mixtral"),
    ("llama", "qwen2_moe"),
    ("qwen2", "qwen2_moe"),
    ("qwen3", "qwen3_moe"),
]
PLAIN: dict[str, Any] = {"experts_implementation": "eager"}  # transformers' default needs widths of whole 16 bytes


def everything(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


@pytest.mark.parametrize("name", tiny.MODELS)
def test_moeify_format_holds_the_state_of_the_in_place_model_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    before = tiny.logits(model, name)
    src = tiny.save(model, tmp_path / "src")
    plan = tiny.convert_files(src, tmp_path / "moe", CONFIG, target="moeify")
    loaded = moeify.load(tmp_path / "moe")
    moeify.convert(model, CONFIG)
    expected, found = model.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert tiny.relative(tiny.logits(loaded, name), before) < TOLERANCE_FP32
    with open_source(src) as source:
        report = verify_slice(DenseCheckpoint(source), tmp_path / "moe", plan)
    assert report.passed and report.top1_agreement == 1


@pytest.mark.parametrize(("name", "target"), NATIVE)
def test_native_checkpoints_load_in_stock_transformers_and_compute_the_same(
    name: str, target: str, tmp_path: Path
) -> None:
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    model = tiny.build(name)
    src = tiny.save(model, tmp_path / "src")
    tiny.convert_files(src, tmp_path / "moe", CONFIG, target=target)
    loaded, info = auto.from_pretrained(tmp_path / "moe", output_loading_info=True, **PLAIN)
    assert type(loaded).__name__ == FAMILIES[target].architecture
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert tiny.relative(tiny.logits(loaded.eval(), name), tiny.logits(model, name)) < TOLERANCE_FP32


@pytest.mark.parametrize(
    "name", ["LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "LlamaForTokenClassification"]
)
def test_models_without_a_language_head_become_moeify_format(name: str, tmp_path: Path) -> None:
    cls: Any = getattr(tiny.tf, name)
    model = cls(cls.config_class(**tiny._LLAMA))
    src = tiny.save(model, tmp_path / "src")
    plan = tiny.convert_files(src, tmp_path / "moe", CONFIG)
    assert plan.target == "moeify"
    with open_source(src) as source:
        assert verify_slice(DenseCheckpoint(source), tmp_path / "moe", plan).passed


def test_mixtral_keys_are_those_of_the_hub_and_its_bytes_those_of_the_in_place_model(tmp_path: Path) -> None:
    model = tiny.build("llama")
    tiny.convert_files(tiny.save(model, tmp_path / "src"), tmp_path / "moe", CONFIG)
    moeify.convert(model, CONFIG)
    written = everything(tmp_path / "moe")
    block = "model.layers.1.block_sparse_moe"
    stacked = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    down = model.get_parameter("model.layers.1.mlp.experts.down_proj")
    assert torch.equal(written[f"{block}.gate.weight"], model.get_parameter("model.layers.1.mlp.router.weight"))
    for expert in range(3):
        assert torch.equal(written[f"{block}.experts.{expert}.w1.weight"], stacked[expert, : tiny.INTERMEDIATE])
        assert torch.equal(written[f"{block}.experts.{expert}.w3.weight"], stacked[expert, tiny.INTERMEDIATE :])
        assert torch.equal(written[f"{block}.experts.{expert}.w2.weight"], down[expert])
    assert not [key for key in written if ".mlp." in key]


def test_layers_that_stay_dense_are_listed_in_the_native_config(tmp_path: Path) -> None:
    model = tiny.build("qwen3")
    tiny.convert_files(tiny.save(model, tmp_path / "src"), tmp_path / "moe", CONFIG, layers="1")
    config = json.loads((tmp_path / "moe/config.json").read_text())
    assert config["model_type"] == "qwen3_moe" and config["mlp_only_layers"] == [0, 2]
    loaded = moeify.load(tmp_path / "moe", **PLAIN)
    assert tiny.relative(tiny.logits(loaded, "qwen3"), tiny.logits(model, "qwen3")) < TOLERANCE_FP32


@pytest.mark.parametrize("target", ["mixtral", "moeify"])
def test_shards_and_one_file_hold_the_same(target: str, tmp_path: Path) -> None:
    model = tiny.build("llama")
    src = tiny.save(model, tmp_path / "src", max_shard_size="50KB")
    assert len(list(src.glob("*.safetensors"))) > 1
    tiny.convert_files(src, tmp_path / "one", CONFIG, target=target)
    tiny.convert_files(src, tmp_path / "many", CONFIG, target=target, shard_size=40_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = everything(tmp_path / "one"), everything(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[key], many[key]) for key in one)
    loaded = moeify.load(tmp_path / "many", **PLAIN)
    assert tiny.relative(tiny.logits(loaded, "llama"), tiny.logits(model, "llama")) < TOLERANCE_FP32


def test_dtype_casts_what_floats(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("phi3"), tmp_path / "src")
    tiny.convert_files(src, tmp_path / "moe", CONFIG, dtype="BF16", target="moeify")
    written = everything(tmp_path / "moe")
    kinds = {".router." in name: tensor.dtype for name, tensor in written.items()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    assert {tensor.dtype for name, tensor in written.items() if ".router." not in name} == {torch.bfloat16}
    config = json.loads((tmp_path / "moe/config.json").read_text())
    assert config["dtype"] == "bfloat16"
    dense = load_file(src / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(written["model.layers.0.mlp.experts.down_proj"][1], dense.bfloat16())


def test_older_names_on_disk_are_understood(tmp_path: Path) -> None:
    model = tiny.build("bert")
    src = tiny.save(model, tmp_path / "src")
    tensors = load_file(src / "model.safetensors")
    older = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
             for key, value in tensors.items()}  # fmt: skip
    save_file(older, src / "model.safetensors", {"format": "pt"})
    tiny.convert_files(src, tmp_path / "moe", CONFIG)
    loaded = moeify.load(tmp_path / "moe")
    assert tiny.relative(tiny.logits(loaded, "bert"), tiny.logits(model, "bert")) < TOLERANCE_FP32


def test_tensors_that_the_model_has_no_place_for_are_reported_and_left_out(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    tensors = load_file(src / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    unused: list[str] = []
    tiny.convert_files(src, tmp_path / "moe", CONFIG, callbacks=Callbacks(unused=unused.extend))
    assert unused == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert unused[0] not in everything(tmp_path / "moe")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    tensors = load_file(src / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        tiny.convert_files(src, tmp_path / "moe", CONFIG)
    assert not (tmp_path / "moe").exists()


def test_nonfinite_weights_are_named_once(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("mistral"), tmp_path / "src")
    tensors = load_file(src / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 4] = torch.nan
    save_file(tensors, src / "model.safetensors", {"format": "pt"})
    named: list[str] = []
    tiny.convert_files(src, tmp_path / "moe", CONFIG, callbacks=Callbacks(nonfinite=named.append))
    assert named == ["model.layers.2.mlp.down_proj.weight"]


class Killed(KeyboardInterrupt):
    """Stands for a signal: what it interrupts stays for a resume."""


def test_an_output_replaces_nothing_and_goes_on_with_nothing_unless_asked() -> None:
    plain = Output(Path("moe"), 60_000)
    assert not plain.overwrite and not plain.resume


def test_a_killed_conversion_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    tiny.convert_files(src, tmp_path / "whole/moe", CONFIG, shard_size=60_000)
    written = 0

    def kill(nbytes: int) -> None:
        nonlocal written
        written += nbytes
        if written > 200_000:
            raise Killed

    with pytest.raises(Killed):
        tiny.convert_files(src, tmp_path / "killed/moe", CONFIG, shard_size=60_000, callbacks=Callbacks(written=kill))
    assert not (tmp_path / "killed/moe").exists()
    tiny.convert_files(src, tmp_path / "killed/moe", CONFIG, shard_size=60_000, resume=True)
    names = {path.name for path in (tmp_path / "whole/moe").iterdir()}
    assert names == {path.name for path in (tmp_path / "killed/moe").iterdir()}
    assert all((tmp_path / "whole/moe" / n).read_bytes() == (tmp_path / "killed/moe" / n).read_bytes() for n in names)


@pytest.mark.parametrize("change", ["replaced", "touched", "removed"])
def test_a_source_that_changes_meanwhile_is_noticed_before_the_output_appears(change: str, tmp_path: Path) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    weights = src / "model.safetensors"

    def meanwhile(_: Path) -> None:
        status = weights.stat()
        if change == "replaced":  # by one that looks the same
            (tmp_path / "other").write_bytes(weights.read_bytes()[:-1] + b"x")
            os.utime(tmp_path / "other", ns=(status.st_atime_ns, status.st_mtime_ns))
            (tmp_path / "other").rename(weights)
        elif change == "touched":
            os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        else:
            weights.unlink()

    message = r"model\.safetensors was removed while" if change == "removed" else r"src changed while it was read"
    with pytest.raises(CheckpointError, match=message):
        tiny.convert_files(src, tmp_path / "moe", CONFIG, callbacks=Callbacks(check=meanwhile))
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_the_plan_is_kept_with_the_output_and_makes_the_same_again(tmp_path: Path) -> None:
    src = tiny.save(tiny.build("gemma"), tmp_path / "src")
    plan = tiny.convert_files(src, tmp_path / "moe", MoEConfig(3, 2, seed=5), layers="last:2")
    kept: dict[str, Any] = json.loads((tmp_path / "moe/moeify.json").read_text())
    assert Plan.from_dict(kept) == plan


def small(architecture: str, config: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    return tiny.draw(getattr(transformers, architecture)(config).eval())


def test_tensors_that_transformers_merges_or_makes_itself_are_no_obstacle(tmp_path: Path) -> None:
    import transformers

    sizes: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 37, "vocab_size": 50}
    split = transformers.NomicBertConfig(num_attention_heads=2, head_dim=12, **sizes)
    made = transformers.MarianConfig(
        d_model=24, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=37, decoder_ffn_dim=37, vocab_size=50,
        encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0, max_position_embeddings=32,
    )  # fmt: skip
    for architecture, config in (("NomicBertForMaskedLM", split), ("MarianMTModel", made)):
        src = tiny.save(small(architecture, config), tmp_path / architecture)
        plan = tiny.convert_files(src, tmp_path / f"{architecture}-moe", CONFIG)
        with open_source(src) as source:
            assert verify_slice(DenseCheckpoint(source), tmp_path / f"{architecture}-moe", plan).passed


def test_learned_activations_and_norms_inside_come_along(tmp_path: Path) -> None:
    import transformers

    sizes: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 37, "vocab_size": 50,
                             "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}  # fmt: skip
    for architecture, config in (
        ("ApertusForCausalLM", transformers.ApertusConfig(**sizes)),
        ("BitNetForCausalLM", transformers.BitNetConfig(**sizes)),
    ):
        model = small(architecture, config)
        src = tiny.save(model, tmp_path / architecture)
        plan = tiny.convert_files(src, tmp_path / f"{architecture}-moe", CONFIG)
        assert plan.sites[0].activation == "custom" and plan.sites[0].activation_state
        with open_source(src) as source:
            assert verify_slice(DenseCheckpoint(source), tmp_path / f"{architecture}-moe", plan).passed
        loaded = moeify.load(tmp_path / f"{architecture}-moe")
        moeify.convert(model, CONFIG)
        expected, found = model.state_dict(), loaded.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
