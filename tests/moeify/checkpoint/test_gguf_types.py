"""The quantizations of GGUF with blocks of 256 values, which the gguf library reads and does not write."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file

from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from tests.moeify import tiny
from tests.moeify.checkpoint.make_gguf import Q, blocks, write_llama

TYPES = [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ1_S, Q.IQ1_M, Q.IQ2_XXS, Q.IQ2_XS, Q.IQ2_S, Q.IQ3_XXS, Q.IQ3_S,
         Q.IQ4_NL, Q.IQ4_XS, Q.TQ1_0, Q.TQ2_0]  # fmt: skip
PLACES = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_v": "self_attn.v_proj",
}


@pytest.mark.parametrize("first", range(0, len(TYPES), len(PLACES)))
def test_every_type_is_read(first: int, tmp_path: Path) -> None:
    types = dict(zip(PLACES, TYPES[first:], strict=False))
    file = write_llama(tmp_path / "tiny.gguf", types, times=8)
    stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    expected = {}
    for name, place in PLACES.items():
        tensor = stored[f"blk.0.{name}.weight"]
        assert tensor.tensor_type == types[name]
        expected[place] = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
    with open_source(file) as source:
        for place, values in expected.items():
            assert torch.equal(source.read(f"model.layers.0.{place}.weight"), values)
    if first == 0:
        tiny.convert_files(file, tmp_path / "moe", MoEConfig(2, 1), target="mixtral")
        moe = load_file(tmp_path / "moe/model.safetensors")
        assert torch.equal(moe["model.layers.0.block_sparse_moe.experts.1.w2.weight"], expected["mlp.down_proj"])


def q4_k(block: bytes) -> list[float]:
    """Two halves of 6-bit scales and minima for 8 runs of 32 values: ggml's `dequantize_row_q4_K`."""
    d, least = np.frombuffer(block[:4], np.float16).astype(float)
    packed, values = block[4:16], block[16:]
    result = []
    for run in range(8):
        if run < 4:
            scale, minimum = packed[run] & 63, packed[run + 4] & 63
        else:
            scale = packed[run + 4] & 15 | packed[run - 4] >> 6 << 4
            minimum = packed[run + 4] >> 4 | packed[run] >> 6 << 4
        for byte in values[run // 2 * 32 : run // 2 * 32 + 32]:
            result.append(d * scale * (byte >> 4 * (run % 2) & 15) - least * minimum)
    return result


def q6_k(block: bytes) -> list[float]:
    """Four low bits and two high bits of each value, a scale for each 16: ggml's `dequantize_row_q6_K`."""
    low, high, scales = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8)
    d = float(np.frombuffer(block[208:], np.float16)[0])
    result = []
    for value in range(256):
        half, run, place = value // 128, value // 32 % 4, value % 32
        four = low[half * 64 + run % 2 * 32 + place] >> 4 * (run // 2) & 15
        two = high[half * 32 + place] >> 2 * run & 3
        result.append(d * int(scales[value // 16]) * ((four | two << 4) - 32))
    return result


@pytest.mark.parametrize(("kind", "read"), [(Q.Q4_K, q4_k), (Q.Q6_K, q6_k)])
def test_the_library_reads_blocks_as_they_are_described(kind: Q, read: object) -> None:
    stored = blocks((3, 256), kind, np.random.default_rng(0))
    found = gguf.quants.dequantize(stored, kind)
    for row, values in zip(stored, found, strict=True):
        expected = np.array(read(row.tobytes()))  # type: ignore[operator]
        assert np.abs(values - expected).max() <= 1e-6 * np.abs(expected).max()
