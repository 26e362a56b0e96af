"""Cut an onnxruntime-gpu wheel down to what one GPU architecture runs, in pieces that can travel with a checkout.

    python -m benchmarks.gpu.onnx.slim WHEEL OUT [--architecture 90] [--keep-unused]

TensorRT's provider, the C library and the tools are left out. `unpack` puts the pieces together again. Needs zstandard.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import re
import tarfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.gpu.onnx.fatbin import slim
from benchmarks.gpu.onnx.unpack import BASE, MANIFEST

LIBRARY = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
LEFT_OUT = re.compile(
    r"libonnxruntime_providers_tensorrt\.so$|libonnxruntime\.so|^onnxruntime/(transformers|quantization|tools|datasets|backend)/"
)
PIECE = 12 * 10**6  # bytes of a piece before compression, blank pages not counted
LARGEST = 55 * 10**6  # bytes of all pieces that can travel at once
_PAGE = 1 << 16


def pieces(data: bytes | bytearray, target: int = PIECE) -> list[tuple[int, int]]:
    """Return ranges of a file that hold about `target` bytes each, blank pages not counted."""
    ranges, start, weight, blank = [], 0, 0, bytes(_PAGE)
    for place in range(0, len(data), _PAGE):
        weight += _PAGE * (data[place : place + _PAGE] != blank)
        if weight >= target:
            ranges.append((start, min(place + _PAGE, len(data))))
            start, weight = place + _PAGE, 0
    return ranges + ([(start, len(data))] if start < len(data) else [])


def without_library(path: Path) -> tuple[bytes, bytearray]:
    """Return a wheel's other files as a tar archive, and the CUDA library."""
    tar, library = io.BytesIO(), bytearray()
    with zipfile.ZipFile(path) as wheel, tarfile.open(fileobj=tar, mode="w") as archive:
        for info in wheel.infolist():
            if info.filename == LIBRARY:
                library = bytearray(wheel.read(info))
            elif not info.is_dir() and not LEFT_OUT.search(info.filename):
                entry = tarfile.TarInfo(info.filename)
                entry.size, entry.mode = info.file_size, 0o755 if ".so" in info.filename else 0o644
                archive.addfile(entry, io.BytesIO(wheel.read(info)))
    if not library:
        raise SystemExit(f"{path} holds no {LIBRARY}")
    return tar.getvalue(), library


def write(wheel: Path, out: Path, architecture: int, *, keep_unused: bool, preset: int = 9) -> int:
    """Write the pieces and their manifest; return their bytes."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("*.xz"), *out.glob(MANIFEST)):
        old.unlink()
    base, library = without_library(wheel)
    report = slim(library, architecture, keep_unused=keep_unused)
    ranges = pieces(library)
    contents = {BASE: base} | {f"cuda.{n:02}.xz": bytes(library[a:b]) for n, (a, b) in enumerate(ranges)}
    with ProcessPoolExecutor(2) as pool:
        packed = pool.map(_pack, contents.values(), [preset] * len(contents))
        for name, content in zip(contents, packed, strict=True):
            (out / name).write_bytes(content)
            print(f"{name}: {len(content) / 1e6:.2f} MB", flush=True)
    digest = hashlib.sha256(library).hexdigest()
    manifest = {"wheel": wheel.name, "architecture": architecture, "library": LIBRARY, "size": len(library),
                "sha256": digest, "pieces": list(contents)[1:], **vars(report)}  # fmt: skip
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return sum(path.stat().st_size for path in out.glob("*.xz"))


def _pack(content: bytes, preset: int) -> bytes:
    return lzma.compress(content, preset=preset | lzma.PRESET_EXTREME)


def main() -> None:
    """Cut a wheel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--keep-unused", action="store_true", help="kernels that exports never call, too: 54 MB more")
    options = parser.parse_args()
    total = write(options.wheel, options.out, options.architecture, keep_unused=options.keep_unused)
    print(f"{total / 1e6:.2f} MB in all")
    if total > LARGEST:
        raise SystemExit(f"more than {LARGEST / 1e6:.0f} MB: carry the pieces in two steps")


if __name__ == "__main__":
    main()
