from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeify.checkpoint.source import Source, open_source
from moeify.config import MoEConfig
from moeify.errors import CheckpointError
from moeify.files.limits import SIZES
from moeify.hub.loading import load_sparingly, load_structure
from moeify.hub.structure import check_output
from tests.moeify import tiny
from tests.moeify.command import moeify_command

Tensors = dict[str, torch.Tensor]
CONFIG = MoEConfig(experts=3, top_k=2)
NATIVE, MOEIFY = "model.layers.2.block_sparse_moe.experts.1", "model.layers.2.mlp.experts.down_proj"


def output(tmp_path: Path, name: str, target: str = "auto") -> Path:
    src = tiny.save(tiny.build(name), tmp_path / "src")
    tiny.convert_files(src, tmp_path / "moe", CONFIG, target=target)
    return tmp_path / "moe"


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


@pytest.mark.parametrize("target", ["auto", "moeify"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "bert", "t5", "phi3"])
def test_what_was_written_is_accepted_and_not_read(
    name: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = output(tmp_path, name, target)
    monkeypatch.delattr(Source, "read")
    check_output(folder)
    with open_source(folder) as source:
        assert all(parameter.is_meta for parameter in load_structure(source).parameters())


def transpose(name: str) -> Callable[[Tensors], None]:
    return lambda t: t.update({name: t[name].transpose(-1, -2)})


@pytest.mark.parametrize(
    ("target", "change", "words"),
    [
        ("mixtral", transpose("model.layers.2.self_attn.k_proj.weight"), r"k_proj.weight \(\[36, 12\] instead"),
        ("mixtral", transpose(f"{NATIVE}.w2.weight"), "transformers does not load the model"),
        ("mixtral", lambda t: t.pop(f"{NATIVE}.w2.weight"), r"down_proj \(\[2, 36, 57\] instead of \[3, 36"),
        ("mixtral", lambda t: t.pop("model.norm.weight"), "missing tensor model.norm.weight"),
        ("mixtral", lambda t: t.update(stray=torch.ones(2)), "unexpected tensor stray"),
        ("mixtral", lambda t: t.update({"model.norm.weight": torch.ones(36, dtype=torch.int8)}), "norm.weight is I8"),
        ("moeify", transpose(MOEIFY), r"down_proj \(\[3, 57, 36\] instead of \[3, 36, 57\]\)"),
        ("moeify", lambda t: t.pop("model.layers.2.mlp.router.weight"), "mlp.router.weight"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_found_in_any_layer(
    tmp_path: Path, target: str, change: Callable[[Tensors], None], words: str
) -> None:
    folder = output(tmp_path, "llama", target)
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=f"the output would not load: .*{words}") as raised:
        check_output(folder)
    assert "\n" not in str(raised.value)


def test_a_config_that_asks_for_code_is_not_asked_about_again(tmp_path: Path) -> None:
    folder = output(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "configuration_x.X"}}))
    check_output(folder)


@pytest.mark.parametrize("options", [(), ("--no-verify",)])
def test_a_conversion_whose_output_would_not_load_leaves_nothing(tmp_path: Path, options: tuple[str, ...]) -> None:
    src = tiny.save(tiny.build("llama"), tmp_path / "src")
    name = "model.layers.2.self_attn.k_proj.weight"  # no part of the slice that a proof runs
    rewrite(src, transpose(name))
    arguments = ["convert", str(src), str(tmp_path / "moe"), "--experts", "3", "--top-k", "2", *options]
    result = moeify_command(*arguments)
    assert result.exit_code == 1 and name in result.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("target", ["auto", "moeify"])
def test_no_memory_is_taken_for_what_a_damaged_config_asks_for(target: str, tmp_path: Path) -> None:
    folder = output(tmp_path, "llama", target)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": SIZES}))
    refused = pytest.raises(CheckpointError, match=r"mismatched tensor .*instead of \[10000000, 36\]")
    with open_source(folder) as source, refused:
        load_structure(source)
    with refused:
        load_sparingly(folder, torch.float32)
