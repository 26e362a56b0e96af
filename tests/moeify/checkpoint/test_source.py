from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moeify.checkpoint.source import open_source
from moeify.errors import CheckpointError

WEIGHTS = {"a": torch.arange(15.0).reshape(5, 3), "b": torch.ones(7, dtype=torch.bfloat16)}


def write_model(folder: Path, **config: Any) -> Path:
    """Two tensors in two shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    for number, name in enumerate(WEIGHTS, 1):
        save_file({name: WEIGHTS[name]}, folder / f"model-{number}.safetensors")
    write_index(folder, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(src: str | Path, **flags: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(src, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_read_as_one_model(tmp_path: Path) -> None:
    with open_source(str(write_model(tmp_path / "m"))) as source:
        assert source.model_type == "llama"
        assert list(source.tensors) == ["a", "b"]
        assert source.tensors["b"].dtype == "BF16"
        assert source.tensors["a"].nbytes == 60
        for name, expected in WEIGHTS.items():
            assert torch.equal(source.read(name), expected)
        with pytest.raises(CheckpointError, match="has no tensor c among its 2"):
            source.read("c")


def test_the_whole_file_wins_over_the_index(tmp_path: Path) -> None:
    write_model(tmp_path)
    save_file({"whole": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(open_source(tmp_path).tensors) == ["whole"]


def test_experts_that_this_library_quantized_are_read_as_they_are_stored(tmp_path: Path) -> None:
    entry = {"quant_method": "moeify_experts", "form": "fp8"}
    with open_source(write_model(tmp_path, quantization_config=entry), quantized_experts="fp8") as source:
        assert source.config["quantization_config"] == entry
        assert torch.equal(source.read("a"), WEIGHTS["a"])


def test_a_read_tensor_is_its_own(tmp_path: Path) -> None:
    source = open_source(write_model(tmp_path))
    source.read("a").zero_()
    assert torch.equal(source.read("a"), WEIGHTS["a"])


def test_side_files_are_copied(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    for name in ("tokenizer.json", "LICENSE", "README.md", "optimizer.pt"):
        (tmp_path / "m" / name).write_text(name)
    (tmp_path / "out").mkdir()
    open_source(tmp_path / "m").write_side_files(tmp_path / "out")
    copied = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert copied == {"tokenizer.json": "tokenizer.json", "LICENSE": "LICENSE"}


def test_the_fingerprint_changes_with_the_source(tmp_path: Path) -> None:
    write_model(tmp_path)
    shard = tmp_path / "model-1.safetensors"
    before = open_source(tmp_path).fingerprint()
    assert open_source(tmp_path).fingerprint() == before
    later = shard.stat().st_mtime_ns + 1_000_000_000
    os.utime(shard, ns=(later, later))
    touched = open_source(tmp_path).fingerprint()
    write_model(tmp_path, rms_norm_eps=1e-6)
    os.utime(shard, ns=(later, later))
    assert len({before, touched, open_source(tmp_path).fingerprint()}) == 3


def test_not_a_model_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    message = refusal(tmp_path)
    for name in ("model.safetensors", "model.safetensors.index.json", ".gguf", "pytorch_model.bin"):
        assert name in message


def cut_shard(folder: Path) -> None:
    shard = folder / "model-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_shard, "truncated"),
        (lambda folder: (folder / "config.json").unlink(), "has weights but no config.json"),
        (lambda folder: write_index(folder, {"a": "/etc/passwd"}), "leads outside the folder"),
        (lambda folder: write_index(folder, {"c": "model-1.safetensors"}), "holds c, but it does not"),
    ],
)
def test_a_spoiled_folder(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    folder = write_model(tmp_path / "m")
    spoil(folder)
    assert message in refusal(folder)


def test_remote_code_needs_a_flag(tmp_path: Path) -> None:
    write_model(tmp_path, auto_map={"AutoConfig": "configuration_x.X"})
    assert "--trust-remote-code" in refusal(tmp_path)
    assert open_source(tmp_path, trust_remote_code=True).model_type == "llama"


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write_model(tmp_path)
    save_file(WEIGHTS, tmp_path / "model-2.safetensors")
    assert "a is in both model-1.safetensors and model-2.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("src", ["./nothing", "a/b/c", "nothing.gguf", Path("nothing")])
def test_a_path_that_does_not_exist_is_not_sought_on_the_hub(src: str | Path) -> None:
    assert "does not exist" in refusal(src)


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    write_model(tmp_path)
    assert "give the folder that holds the model" in refusal(tmp_path / "model-1.safetensors")


def test_several_gguf_files(tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert "holds 2 GGUF files: give the path of one of one.gguf, two.gguf" in refusal(tmp_path)


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repo_id: str, **_: Any) -> str:
        raise OSError("no connection\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    reason = refusal("nobody/nothing")
    assert reason.startswith("nobody/nothing is not a folder here, not in the hub's cache ")
    assert reason.endswith(", and cannot be downloaded from the hub: no connection")


def test_a_hub_id_is_downloaded_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(repo_id: str, *, revision: str, allow_patterns: list[str], **_: Any) -> str:
        asked.append([*allow_patterns, revision])
        return str(write_model(tmp_path))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_source("nobody/something", revision="v1").path == tmp_path
    assert asked[0].pop() == "v1"
    assert not any("bin" in pattern for pattern in asked[0])


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, moeify.checkpoint; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'gguf')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
