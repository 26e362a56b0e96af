"""A wheel cut down and put together again, on a library that is written here."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu.onnx.fatbin import entries, kernel_names, slim
from benchmarks.gpu.onnx.slim import LIBRARY, pieces, write
from benchmarks.gpu.onnx.unpack import unpack


def entry(architecture: int, name: str, size: int = 64, kind: int = 2) -> bytes:
    payload = f"\0.text.{name}\0".encode().ljust(size, b"\xaa")
    rest = struct.pack("<IIHHIIIQQQ", 0, 0, 0, 0, architecture, 0, 0, 0, 0, 0)
    return struct.pack("<HHIQ", kind, 0, 16 + len(rest), len(payload)) + rest + payload


def container(*inside: bytes) -> bytes:
    body = b"".join(inside)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(*containers: bytes) -> bytearray:
    """An ELF file with one section of device code."""
    code, names = b"".join(containers) + bytes(8), b"\0.nv_fatbin\0.names\0"
    head = bytearray(64)
    struct.pack_into("<Q", head, 0x28, 64 + len(code) + len(names))
    struct.pack_into("<HHH", head, 0x3A, 64, 2, 1)
    sections = struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, 64, len(code), 0, 0, 8, 0)
    sections += struct.pack("<IIQQQQIIQQ", 12, 3, 0, 0, 64 + len(code), len(names), 0, 0, 1, 0)
    return head + code + names + sections


ORIGINAL = (
    container(entry(80, "moe_a"), entry(90, "moe_a"), entry(100, "moe_a")),
    container(entry(80, "small", 32), entry(75, "moe_b")),
    container(entry(90, "x12float_e2m1_t_gemm"), entry(90, "moe_c")),
)


def kernels(data: bytearray) -> list[tuple[int, list[str]]]:
    return [(entry.architecture, kernel_names(data, entry)) for entry in entries(data)]


def test_entries_are_found_with_their_kernels() -> None:
    found = kernels(library(*ORIGINAL))
    assert found[:3] == [(80, ["moe_a"]), (90, ["moe_a"]), (100, ["moe_a"])] and len(found) == 7


def test_one_architecture_is_left_in_place() -> None:
    data = library(*ORIGINAL)
    before = len(data)
    report = slim(data, 90)
    assert kernels(data)[:2] == [(90, ["moe_a"]), (80, ["small"])], "the second container holds the filler"
    assert kernels(data)[2:] == [(90, ["moe_c"])]
    assert len(data) == before and (report.containers, report.emptied) == (3, 1)
    assert bytes(data).count(entry(90, "moe_a")) == 1 and bytes(data).count(entry(80, "moe_a")) == 0
    assert slim(data, 90).dropped["sm_90"] == 0, "cut again, nothing more goes"


def test_what_exports_never_call_is_kept_if_asked() -> None:
    data = library(*ORIGINAL)
    slim(data, 90, keep_unused=True)
    assert [names for _, names in kernels(data)][-2:] == [["x12float_e2m1_t_gemm"], ["moe_c"]]


def test_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="has version 2, expected 1"):
        list(entries(library(struct.pack("<IHHQ", 0xBA55ED50, 2, 16, 0))))
    whole = container(entry(90, "x"))
    broken = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(whole) - 16 - 8) + whole[16:]
    with pytest.raises(ValueError, match="does not end with its last entry"):
        list(entries(library(broken)))


def test_blank_pages_weigh_nothing() -> None:
    page = 1 << 16
    data = b"\1" * page + bytes(10 * page) + b"\1" * page
    assert pieces(data, target=2 * page) == [(0, 12 * page)]
    assert pieces(data, target=page) == [(0, page), (page, 12 * page)]


def test_a_wheel_is_cut_carried_and_put_together(tmp_path: Path) -> None:
    wheel, out, site = tmp_path / "x.whl", tmp_path / "out", tmp_path / "site"
    expected = library(*ORIGINAL)
    files = {LIBRARY: bytes(expected), "onnxruntime/__init__.py": b"x = 1", "onnxruntime/tools/big.py": b"no"}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    total = write(wheel, out, 90, keep_unused=False, preset=1)
    assert total == sum(path.stat().st_size for path in out.glob("*.xz"))
    unpack(out, site)
    slim(expected, 90)
    assert (site / LIBRARY).read_bytes() == bytes(expected)
    assert (site / "onnxruntime/__init__.py").read_text() == "x = 1" and not (site / "onnxruntime/tools").exists()


def test_pieces_that_are_missing_or_wrong_are_said(tmp_path: Path) -> None:
    wheel, out, site = tmp_path / "x.whl", tmp_path / "out", tmp_path / "site"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(LIBRARY, bytes(library(*ORIGINAL)))
    write(wheel, out, 90, keep_unused=False, preset=1)
    (out / "cuda.00.xz").rename(out / "kept")
    with pytest.raises(SystemExit, match=r"pieces are missing in .*cuda\.00\.xz"):
        unpack(out, site)
    (out / "kept").rename(out / "cuda.00.xz")
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "pieces": []}))
    with pytest.raises(SystemExit, match="is not the library that was cut"):
        unpack(out, site)
    assert not (site / LIBRARY).exists()
