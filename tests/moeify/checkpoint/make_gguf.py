"""GGUF files of tiny models with random weights."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

Q = gguf.GGMLQuantizationType


def open_writer(path: Path, architecture: str, times: int = 1) -> gguf.GGUFWriter:
    """One layer, hidden 64, two heads, FFN 96, or a multiple of that."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(64 * times)
    writer.add_feed_forward_length(96 * times)
    writer.add_head_count(2)
    return writer


def close_writer(writer: gguf.GGUFWriter, shapes: dict[str, tuple[int, ...]], types: dict[str, Q]) -> None:
    """Random weights, stored as `types` says by the name without layer and suffix, else as F32."""
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        kind = types.get(name.split(".")[-2], Q.F32)
        values = rng.standard_normal(shape, dtype=np.float32)
        try:
            stored = gguf.quants.quantize(values, kind)
        except NotImplementedError:
            stored = blocks(shape, kind, rng)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks(shape: tuple[int, ...], kind: Q, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Random bytes of a type that the library does not write; where its scale is no number, smaller ones."""
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    stored = rng.integers(0, 256, (*shape[:-1], shape[-1] // values, nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        read = gguf.quants.dequantize(stored.reshape(-1, nbytes), kind)
    stored.reshape(-1, nbytes)[~np.isfinite(read).all(-1)] &= 0x3F
    return stored.reshape(*shape[:-1], -1)


def write_llama(
    path: Path, types: dict[str, Q], *, architecture: str = "llama", vocab_size: int = 11, chats: bool = False,
    times: int = 1,
) -> Path:  # fmt: skip
    """One key-value head, so that queries and keys are permuted differently; with a tokenizer if it chats."""
    writer = open_writer(path, architecture, times)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    rows = add_tokenizer(writer) if chats else 11
    writer.add_vocab_size(rows if chats else vocab_size)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (rows, 64), "output": (rows, 64), "output_norm": (64,)}
    layer = {"attn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    layer |= {"ffn_norm": (64,), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    larger = {name: tuple(n if n == rows else n * times for n in shape) for name, shape in shapes.items()}
    close_writer(writer, {f"{name}.weight": shape for name, shape in larger.items()}, types)
    return path


def add_tokenizer(writer: gguf.GGUFWriter) -> int:
    """Bytes, one merge, and a chat template; returns the size of the vocabulary."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    byte_names: Any = bytes_to_unicode
    tokens = [*special, *sorted(byte_names().values()), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(["a b", "a b"])  # transformers 5.17 does not read a list of one
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>")
    return len(tokens)


def write_gpt2(path: Path) -> Path:
    """Transposed projections with biases, and an output matrix of its own.

    transformers takes every GPT-2 to have 1024 positions, whatever the metadata says.
    """
    writer = open_writer(path, "gpt2")
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(11)
    writer.add_token_list([f"t{i}" for i in range(11)])
    rows = {"attn_norm": 64, "attn_qkv": 192, "attn_output": 64, "ffn_norm": 64, "ffn_up": 256, "ffn_down": 64}
    columns = {"attn_qkv": 64, "attn_output": 64, "ffn_up": 64, "ffn_down": 256}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (11, 64), "position_embd.weight": (1024, 64)}
    shapes |= {"output_norm.weight": (64,), "output_norm.bias": (64,), "output.weight": (11, 64)}
    for name, height in rows.items():
        shapes[f"blk.0.{name}.weight"] = (height, columns[name]) if name in columns else (height,)
        shapes[f"blk.0.{name}.bias"] = (height,)
    close_writer(writer, shapes, {"ffn_up": Q.Q8_0, "ffn_down": Q.Q8_0})
    return path


def put(file: Path, after: bytes, skip: int, layout: str, value: int) -> None:
    """Write a number at a distance from the end of the first occurrence of some bytes."""
    raw = bytearray(file.read_bytes())
    start = raw.index(after) + len(after) + skip
    struct.pack_into(layout, raw, start, value)
    file.write_bytes(raw)
