from __future__ import annotations

import errno
import hashlib
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeify.checkpoint import writer
from moeify.config import MoEConfig
from tests.moeify import tiny
from tests.moeify.command import moeify_command

BASE = ("--experts", "3", "--top-k", "2")


convert = partial(moeify_command, "convert")


def digest(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return tiny.save(tiny.build("llama"), tmp_path / "src")


def refused(src: Path, *arguments: object, code: int = 1, dst: Path | None = None) -> str:
    """Convert what must be refused: one line of reason, nothing left behind, the source untouched."""
    before, beside = digest(src), set(src.parent.iterdir())
    result = convert(src, dst or src.parent / "moe", *(arguments or BASE))
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and result.stderr.splitlines()[-1] == errors[0]
    assert digest(src) == before and set(src.parent.iterdir()) == beside
    return errors[0]


def edit_config(src: Path, **changes: Any) -> None:
    path = src / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(src: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(src / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, src / "model.safetensors", {"format": "pt"})


def test_convert_verifies_and_says_what_it_did(src: Path, tmp_path: Path) -> None:
    (src / "tokenizer.json").write_text("{}")
    result = convert(src, tmp_path / "moe", *BASE)
    assert result.exit_code == 0, result.output
    assert "llama → mixtral: 3 FFNs become 3 experts, top-2" in result.stderr
    assert "verified on a slice: 2 layers, the worst model.layers." in result.stderr
    assert result.stdout == ""
    assert (tmp_path / "moe/tokenizer.json").read_text() == "{}"
    record = json.loads((tmp_path / "moe/moeify.json").read_text())
    proof = record["verification"]
    assert proof["passed"] and proof["relative"] < 1e-5
    assert [layer["name"] for layer in proof["layers"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert all(layer["relative"] < 1e-12 and layer["dtype"] == "float64" for layer in proof["layers"])


def test_a_narrower_dtype_is_proved_against_the_rounded_weights(src: Path, tmp_path: Path) -> None:
    result = convert(src, tmp_path / "moe", *BASE, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    verified = moeify_command("verify", src, tmp_path / "moe")
    assert verified.exit_code == 0, verified.output
    assert load_file(tmp_path / "moe/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_a_dry_run_shows_the_plan_and_writes_nothing(src: Path) -> None:
    beside = set(src.parent.iterdir())
    result = convert(src, *BASE, "--dry-run")
    assert result.exit_code == 0, result.output
    for word in ("mixtral", "model.layers.2.mlp", "silu", "active per token", "FLOPs per token"):
        assert word in result.stdout
    assert set(src.parent.iterdir()) == beside


def test_a_saved_plan_makes_the_same_conversion(src: Path, tmp_path: Path) -> None:
    plan = convert(src, *BASE, "--layers", "0", "--seed", "3", "--dry-run", "--json")
    (tmp_path / "plan.json").write_text(plan.stdout)
    assert convert(src, tmp_path / "a", *BASE, "--layers", "0", "--seed", "3", "--no-verify").exit_code == 0
    assert convert(src, tmp_path / "b", "--plan", tmp_path / "plan.json", "--no-verify").exit_code == 0
    first, second = digest(tmp_path / "a"), digest(tmp_path / "b")
    assert first.pop("README.md") != second.pop("README.md")  # each has its own command
    assert first == second


def test_a_plan_for_another_model_is_refused(src: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(convert(src, *BASE, "--dry-run", "--json").stdout)
    edit_config(src, num_hidden_layers=2)
    edited = src
    assert "this model has no FFN there" in refused(edited, "--plan", plan, code=2)


def test_not_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/notes.txt").write_text("hello")
    assert str(tmp_path / "src") in refused(tmp_path / "src")


def test_truncated_shard(src: Path) -> None:
    path = src / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in refused(src)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "model-00009-of-00009.safetensors"}, "model-00009-of-00009.safetensors"),
        ({"no.such.tensor": "part.safetensors"}, "no.such.tensor"),
        ({"a": "../outside.safetensors"}, "outside"),
        ({"a": "/etc/passwd"}, "passwd"),
    ],
)
def test_an_index_that_lies(src: Path, weight_map: dict[str, str], words: str) -> None:
    (src / "model.safetensors").rename(src / "part.safetensors")
    (src / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert words in refused(src)


def test_nonfinite_weights_warn_and_are_refused_when_strict(src: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(src, **{name: torch.full((tiny.INTERMEDIATE, tiny.HIDDEN), torch.inf)})
    result = convert(src, tmp_path / "moe", *BASE, "--no-verify")
    assert result.exit_code == 0 and f"warning: {name} holds NaN or Inf" in result.stderr
    assert name in refused(src, *BASE, "--strict", dst=tmp_path / "strict")


def test_quantised_checkpoints_say_which_scheme(src: Path) -> None:
    edit_config(src, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "gptq" in refused(src)


def test_more_choices_than_experts(src: Path) -> None:
    assert "top_k is 4 but there are only 3 experts" in refused(src, "--experts", 3, "--top-k", 4, code=2)


def test_a_selection_that_matches_nothing(src: Path) -> None:
    assert "selects none of the 3 FFNs" in refused(src, *BASE, "--layers", "encoder", code=2)


def test_an_existing_output_needs_overwrite(src: Path, tmp_path: Path) -> None:
    assert convert(src, tmp_path / "moe", *BASE, "--no-verify").exit_code == 0
    before = digest(tmp_path / "moe")
    assert "--overwrite" in refused(src)
    assert digest(tmp_path / "moe") == before
    assert convert(src, tmp_path / "moe", "--experts", 2, "--top-k", 1, "--overwrite", "--no-verify").exit_code == 0
    assert json.loads((tmp_path / "moe/config.json").read_text())["num_local_experts"] == 2


def test_an_output_inside_the_source(src: Path) -> None:
    assert "overlap" in refused(src, *BASE, "--no-verify", dst=src / "moe")


def test_a_disk_that_fills_half_way(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "copy_span", full)
    assert "disk became full" in refused(src)


def test_a_pickle_needs_a_flag(src: Path, tmp_path: Path) -> None:
    torch.save(load_file(src / "model.safetensors"), src / "pytorch_model.bin")
    (src / "model.safetensors").unlink()
    assert "--allow-pickle" in refused(src)
    assert convert(src, tmp_path / "moe", *BASE, "--allow-pickle").exit_code == 0


def test_remote_code_needs_a_flag(src: Path) -> None:
    edit_config(src, auto_map={"AutoConfig": "configuration_x.X"})
    assert "--trust-remote-code" in refused(src)


def test_an_architecture_without_ffns_says_what_was_looked_at(tmp_path: Path) -> None:
    import transformers

    config: Any = transformers.MambaConfig(hidden_size=24, num_hidden_layers=2, vocab_size=50, state_size=4)
    src = tiny.save(transformers.MambaForCausalLM(config), tmp_path / "src")
    message = refused(src)
    assert "no dense FFN was found in mamba" in message and "out_proj" in message


@pytest.mark.parametrize(
    ("changes", "target", "words"),
    [
        ({"attention_bias": True}, "mixtral", "attention_bias"),
        ({}, "qwen3_moe", "can be made from qwen3"),
        ({}, "nonsense", "expected auto, moeify, "),
    ],
)
def test_a_family_that_would_not_be_exact(tmp_path: Path, changes: dict[str, Any], target: str, words: str) -> None:
    import transformers

    model: Any = tiny.build("llama")
    config = transformers.LlamaConfig.from_dict({**model.config.to_dict(), **changes})
    src = tiny.save(transformers.LlamaForCausalLM(config), tmp_path / "src")
    assert words in refused(src, *BASE, "--to", target, code=2 if target == "nonsense" else 1)


def test_what_is_converted_already_is_not_converted_again(src: Path, tmp_path: Path) -> None:
    assert convert(src, tmp_path / "once", *BASE, "--layers", "0", "--to", "moeify", "--no-verify").exit_code == 0
    again = convert(tmp_path / "once", tmp_path / "twice", *BASE)
    assert again.exit_code == 1 and "converted already: 1 of its FFNs are 3 experts, top-2" in again.stderr
    native = convert(src, tmp_path / "native", *BASE, "--no-verify")
    assert native.exit_code == 0
    assert "mixtral is an MoE already: 3 MoE layers" in convert(tmp_path / "native", tmp_path / "thrice", *BASE).stderr


def test_routers_presets_and_fields_reach_the_checkpoint(src: Path, tmp_path: Path) -> None:
    result = convert(src, tmp_path / "moe", "--preset", "deepseek_v3", "--experts", 6, "--top-k", 3, "--granularity", 3,
                     "--shared-experts", 1, "--seed", 5, "--set", "router.n_group=2", "--set", "router.topk_group=1",
                     "--set", "router.routed_scaling_factor=1", "--set", "attach_losses=true")  # fmt: skip
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "moe/moeify.json").read_text())["config"]
    expected = MoEConfig.deepseek_v3(6, 3, granularity=3, shared_experts=1, seed=5, attach_losses=True,
                                     router={"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.0})  # fmt: skip
    assert MoEConfig.from_dict(config) == expected and expected.exact
    assert "relative" in result.output and "tolerance 1e-02" in result.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--router", "topk"), "router is 'topk': expected one of expert_choice, gshard"),
        (("--set", "zloss=1"), "there is no field zloss; there are experts, top_k"),
        (("--set", "z_loss=much"), "z_loss is 'much': expected a number"),
        (("--set", "attach_losses=1"), "attach_losses is 1: expected True or False"),
        (("--set", "z_loss"), "expected FIELD=VALUE"),
        (("--set", "seed=1", "--seed", 2), "seed is given twice"),
        (("--granularity", 2), "top_k is 3: with granularity 2"),
        (("--plan", "plan.json"), "experts goes without --plan"),
    ],
)
def test_settings_that_are_wrong(src: Path, options: tuple[object, ...], words: str) -> None:
    result = convert(src, "--dry-run", "--experts", 6, "--top-k", 3, *options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_missing_settings_are_wrong_usage(src: Path) -> None:
    assert "--experts and --top-k are needed" in refused(src, "--experts", 3, code=2)
    for size in ("lots", "0", "9" * 400 + "TB", "9" * 18 + "TB", "٣GB"):
        assert "is not a size" in refused(src, *BASE, "--shard-size", size, code=2)
    assert convert(src, *BASE, "--dry-run", "--shard-size", "7000B").exit_code == 0


def test_a_kill_leaves_the_output_absent_and_a_resume_makes_it_whole(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(hidden_size=256, intermediate_size=2048, num_hidden_layers=4, vocab_size=64,
                                      num_attention_heads=4)  # fmt: skip
    src = tiny.save(transformers.LlamaForCausalLM(config), tmp_path / "src")
    dst, partial = tmp_path / "moe", tmp_path / ".moe.moeify-partial"
    command = ["convert", str(src), str(dst), "--experts", "16", "--top-k", "2", "--no-verify", "--shard-size", "20MB"]
    process = subprocess.Popen([sys.executable, "-m", "moeify", *command], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(partial.glob("new/moe/model-*.safetensors"))) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not dst.exists()
    assert moeify_command(*command, "--resume").exit_code == 0
    resumed = digest(dst)
    assert convert(*command[1:], "--overwrite").exit_code == 0
    assert {**resumed, "README.md": ""} == {**digest(dst), "README.md": ""}  # it names "--overwrite"
    assert not partial.exists()


def test_example_inputs_serve_the_plan_and_the_proof(src: Path) -> None:
    given, dst = src.parent / "inputs.json", src.parent / "moe"
    given.write_text('{"inputs_embeds": {"shape": [2, 5, 36]}, "use_cache": false}')
    result = convert(src, dst, *BASE, "--example-inputs", given)
    assert result.exit_code == 0, result.output
    assert "verified on a slice" in result.stderr and (dst / "moeify.json").is_file()
