"""Put together what `slim` cut: `python -m benchmarks.gpu.onnx.unpack FOLDER SITE` makes SITE/onnxruntime.

Pieces are decompressed side by side, because lzma lets go of the interpreter's lock.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import shutil
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BASE, MANIFEST = "base.tar.xz", "manifest.json"


def unpack(folder: Path, site: Path) -> None:
    """Write the package, unless it is there.

    Raises:
        SystemExit: A piece is missing, or the library is not the one that was cut.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    missing = [name for name in (BASE, *manifest["pieces"]) if not (folder / name).exists()]
    if missing:
        raise SystemExit(f"pieces are missing in {folder}: {missing}")
    library = site / manifest["library"]
    if library.exists() and library.stat().st_size == manifest["size"]:
        return
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    with ThreadPoolExecutor(16) as pool:
        base, *parts = pool.map(lambda name: lzma.decompress((folder / name).read_bytes()), (BASE, *manifest["pieces"]))
    with tarfile.open(fileobj=io.BytesIO(base)) as archive:
        archive.extractall(site, filter="data")
    digest = hashlib.sha256()
    library.parent.mkdir(parents=True, exist_ok=True)
    with library.open("wb") as stream:
        for part in parts:
            digest.update(part)
            stream.write(part)
    if digest.hexdigest() != manifest["sha256"]:
        library.unlink()
        raise SystemExit(f"{library} is not the library that was cut")


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
