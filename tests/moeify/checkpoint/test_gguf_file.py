from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, modeling_gguf_pytorch_utils

from moeify.checkpoint.source import Source, open_source
from moeify.cli.demo import model_file
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import Callbacks, Output, convert_checkpoint, plan_checkpoint
from moeify.conversion.dense import DenseCheckpoint
from moeify.errors import CheckpointError
from tests.fuzz.damage.gguf import whole
from tests.moeify.checkpoint.make_gguf import put, write_gpt2, write_llama

Q = gguf.GGMLQuantizationType


@pytest.fixture(scope="module", autouse=True)
def metadata_parsed_once() -> Iterator[None]:
    """transformers parses the metadata of a GGUF file, 5 s for a real vocabulary, each time anything is asked of it."""
    load: Any = modeling_gguf_pytorch_utils.load_gguf_checkpoint
    cached = functools.cache(load)

    def load_once(file: str, return_tensors: bool = False, **rest: Any) -> Any:
        return load(file, return_tensors, **rest) if return_tensors else deepcopy(cached(file))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_gguf_pytorch_utils, "load_gguf_checkpoint", load_once)
        yield


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """A real model, Q4_1 with Q8_0 embeddings; its package is part of the development set-up."""
    return model_file()


@pytest.fixture(scope="module")
def source(smollm2: Path) -> Iterator[Source]:
    with open_source(smollm2) as opened:
        yield opened


def from_transformers(file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What `from_pretrained` loads in float32."""
    # It asks for accelerate, which it does not use on a CPU, and builds the table of names anew for each module.
    monkeypatch.setattr("transformers.modeling_utils.is_accelerate_available", lambda: True)
    monkeypatch.setattr("gguf.get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


def assert_same_model(source: Source, expected: dict[str, torch.Tensor]) -> None:
    tied = {"lm_head.weight"} if source.config["tie_word_embeddings"] else set()
    assert source.tensors.keys() == expected.keys() - tied
    for name, info in source.tensors.items():
        read = source.read(name)
        assert (info.dtype, info.shape) == ("F32", tuple(expected[name].shape))
        assert torch.equal(read.view(torch.int32), expected[name].view(torch.int32)), name


def test_a_real_model_equals_what_transformers_loads(
    source: Source, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_same_model(source, from_transformers(smollm2, monkeypatch))


def test_a_real_model_has_a_config_and_side_files(source: Source, tmp_path: Path) -> None:
    assert source.model_type == "llama"
    assert source.config["architectures"] == ["LlamaForCausalLM"]
    assert (source.config["hidden_size"], source.config["intermediate_size"]) == (576, 1536)
    assert json.loads(json.dumps(source.config)) == source.config
    assert source.span("model.norm.weight") is None
    source.write_side_files(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("The answer is 42.")["input_ids"]
    assert tokenizer.decode(ids) == "The answer is 42."
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2


def test_every_storage_type_equals_what_transformers_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    types = {"token_embd": Q.F16, "output": Q.BF16, "attn_q": Q.Q8_0, "attn_k": Q.Q4_0, "attn_v": Q.Q5_1}
    types |= {"attn_output": Q.Q5_0, "ffn_gate": Q.Q4_1, "ffn_up": Q.F16}
    file = write_llama(tmp_path / "tiny.gguf", types)
    with open_source(tmp_path) as source:
        assert source.path == file
        assert_same_model(source, from_transformers(file, monkeypatch))


def test_transposed_weights_equal_what_transformers_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gpt2(tmp_path / "tiny.gguf")
    with open_source(file) as source:
        assert source.tensors["transformer.h.0.mlp.c_fc.weight"].shape == (64, 256)
        assert_same_model(source, from_transformers(file, monkeypatch))


def test_the_file_is_mapped_while_it_is_open_and_no_longer(tmp_path: Path) -> None:
    file, maps = write_llama(tmp_path / "tiny.gguf", {}), Path("/proc/self/maps")
    with open_source(file) as source:
        assert str(file) in maps.read_text()
    assert str(file) not in maps.read_text()
    assert source.model_type == "llama"


def test_a_tokenizer_and_its_chat_template_are_written_beside_the_model(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with open_source(write_llama(tmp_path / "tiny.gguf", {}, chats=True)) as source:
        source.write_side_files(tmp_path / "out")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("ab?")["input_ids"] == tokenizer.convert_tokens_to_ids(["ab", "?"])
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith(
        "<|im_start|>Hi"
    )


def test_a_file_without_a_tokenizer_is_a_model_without_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "tiny.gguf").write_bytes(whole(None).bytes())
    with open_source(tmp_path / "tiny.gguf") as source:
        source.write_side_files(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["generation_config.json"]


def test_a_tokenizer_that_cannot_be_built_is_told_before_tensors_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no such converter")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    dense = DenseCheckpoint(open_source(write_llama(tmp_path / "tiny.gguf", {}, chats=True)))
    plan = plan_checkpoint(dense, MoEConfig(2, 1), "all", "auto")
    written: list[int] = []
    with pytest.raises(CheckpointError, match="does not load its tokenizer"):
        convert_checkpoint(dense, plan, Output(tmp_path / "out", shard_size=10**9), Callbacks(written=written.append))
    assert not written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]


def refusal(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    return str(caught.value)


def test_damaged_files(tmp_path: Path) -> None:
    file = write_llama(tmp_path / "tiny.gguf", {})
    whole = file.read_bytes()
    for length in (0, 3, 10, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "cannot be read as GGUF, or is truncated" in refusal(file)


def test_an_unsupported_architecture_is_named(tmp_path: Path) -> None:
    file = write_llama(tmp_path / "tiny.gguf", {}, architecture="rwkv6")
    assert "the GGUF architecture 'rwkv6' is not supported" in refusal(file)


def test_an_unsupported_quantization_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_llama(tmp_path / "tiny.gguf", {"ffn_up": Q.Q8_0})
    monkeypatch.delitem(gguf.quants._type_traits, Q.Q8_0)
    assert "the GGUF quantization Q8_0 of blk.0.ffn_up.weight is not known to the gguf package" in refusal(file)


def test_a_tensor_that_does_not_fit_the_config(tmp_path: Path) -> None:
    file = write_llama(tmp_path / "tiny.gguf", {}, vocab_size=12)
    assert "model.embed_tokens.weight has shape [11, 64], the model expects [12, 64]" in refusal(file)


def with_extra_tensor(path: Path, name: str) -> Path:
    """A file that holds one tensor more than the model needs."""
    write_llama(path, {})
    renamed = path.read_bytes().replace(b"blk.0.attn_norm.weight", name.encode().ljust(22, b"_"))
    path.write_bytes(renamed)
    return path


def test_a_tensor_that_no_model_has_is_named_and_not_read(tmp_path: Path) -> None:
    with open_source(with_extra_tensor(tmp_path / "tiny.gguf", "rope_freqs.weight")) as source:
        assert source.unused == ("rope_freqs.weight_____",)
        assert len(source.tensors) == 11 and "rope_freqs.weight_____" not in source.tensors


def test_layers_beyond_those_of_the_metadata_are_not_left_out(tmp_path: Path) -> None:
    file = with_extra_tensor(tmp_path / "tiny.gguf", "blk.1.attn_norm.weight")
    assert "holds blk.1.attn_norm.weight, but its metadata says that there are 1 layers" in refusal(file)


def test_a_file_that_is_cut_after_it_was_opened_is_not_touched(tmp_path: Path) -> None:
    file = write_llama(tmp_path / "tiny.gguf", {})
    with open_source(file) as source:
        file.write_bytes(b"")  # what is mapped is gone: reading it would end the process
        with pytest.raises(CheckpointError, match="changed while it was read"):
            source.read("model.norm.weight")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.head_count", 5),
        ("llama.attention.head_count", 128),
        ("llama.embedding_length", 0),
        ("llama.embedding_length", 2**31),
        ("llama.feed_forward_length", 0),
        ("llama.context_length", 0),
    ],
)
def test_metadata_that_do_not_fit_the_tensors(key: str, value: int, tmp_path: Path) -> None:
    file = write_llama(tmp_path / "tiny.gguf", {})
    put(file, key.encode(), 4, "<I", value)  # the type stands between key and value
    try:
        with open_source(file) as source:
            for name in source.tensors:
                source.read(name)
    except CheckpointError as error:
        assert "\n" not in str(error) and str(file) in str(error)
    else:
        assert key == "llama.context_length"  # what the model is trained for: no tensor depends on it
