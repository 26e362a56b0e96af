"""`moeify convert SRC DST.gguf`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import gguf

from tests.moeify import tiny
from tests.moeify.cli.test_convert import BASE, convert


def test_a_file_for_llama_cpp(tmp_path: Path) -> None:
    src, out = tiny.save(tiny.build("llama"), tmp_path / "src"), tmp_path / "moe.gguf"
    done = convert(src, out, *BASE, "--dtype", "f16")
    assert done.exit_code == 0 and "verified on a slice: 2 layers" in done.stderr and f"written to {out}" in done.stderr
    assert "llama → mixtral" in done.stderr and "before training" not in done.stderr
    assert out.read_bytes()[:4] == b"GGUF" and sorted(tmp_path.iterdir()) == [out, src]
    record = json.loads(gguf.GGUFReader(out).fields["moeify.json"].contents())
    assert len(record["verification"]["layers"]) == 2
    again = convert(src, out, *BASE)
    assert again.exit_code == 1 and "exists" in again.stderr
    before = out.stat().st_size
    assert convert(src, out, *BASE, "--dtype", "f32", "--overwrite", "--no-verify").exit_code == 0
    assert out.stat().st_size > 1.5 * before
    for place, said in (("x.gguf", False), ("x", True)):
        dry = convert(src, place, *BASE, "--to", "glm4_moe", "--dry-run").stdout
        assert "has a sigmoid router" in dry and ("GLM" in dry) is said  # a note on llama.cpp's converter
    assert "is not written as GGUF: choose" in convert(src, "x.gguf", *BASE, "--to", "granitemoe_swa").stderr
