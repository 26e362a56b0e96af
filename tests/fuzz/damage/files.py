"""Damage that any file can have: its bytes, its text, and what stands in its place."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import gettempdir

HUGE = 3 * 2**30


def at(name: str, damage: Callable[[Random, Path], str]) -> Callable[[Random, Path], str]:
    """Return the damage of one file of a folder."""
    return lambda rng, src: damage(rng, src / name)


def flip(rng: Random, path: Path, start: int = 0, stop: int | None = None) -> str:
    """Turn one to three bits over, between two places."""
    data = bytearray(path.read_bytes())
    places = [rng.randrange(start, min(stop or len(data), len(data))) for _ in range(rng.randint(1, 3))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bits of {path.name} at {places} turned"


def truncate(rng: Random, path: Path) -> str:
    size = path.stat().st_size
    left = rng.choice((0, 1, 7, 8, 9, size // 2, size - 1, rng.randrange(size)))
    os.truncate(path, left)
    return f"{path.name} cut to {left} of {size} bytes"


def append(rng: Random, path: Path) -> str:
    more = rng.choice((b"\0", b"\xff" * 9, path.read_bytes()))
    path.write_bytes(path.read_bytes() + more)
    return f"{path.name} with {len(more)} bytes more"


def overwrite(rng: Random, path: Path) -> str:
    """Write random bytes over a piece."""
    data = bytearray(path.read_bytes())
    start, size = rng.randrange(len(data)), rng.choice((4, 64, 4096))
    data[start : start + size] = rng.randbytes(min(size, len(data) - start))
    path.write_bytes(data)
    return f"{size} bytes of {path.name} at {start} random"


def of_bytes(rng: Random, path: Path) -> str:
    return rng.choice((flip, truncate, append, overwrite))(rng, path)


def of_text(rng: Random, path: Path) -> str:
    """Text that is JSON no more, or JSON that no reader expects."""
    text = path.read_text()
    texts: dict[str, bytes] = {
        "with a byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "in UTF-16": text.encode("utf-16"),
        "in Latin-1": b'{"x\xe9": 1}',
        "of lists in lists": b"[" * rng.choice((1000, 100_000)),
        "of objects in objects": b'{"a":' * rng.choice((2000, 50_000)),
        "of whole lists in lists": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "of one long number": b'{"a": ' + b"9" * 5000 + b"}",
        "with NUL": text.encode().replace(b":", b":\0", 1),
        "with a key twice": b"{" + b'"model_type": "llama", ' * 2 + text.strip()[1:].encode(),
        "of 200000 keys": ("{" + ",".join(f'"{i % 199_999}": 0' for i in range(200_000)) + "}").encode(),
        "without its end": text.encode()[: rng.randrange(len(text))],
        "of nothing": b"",
        "of a word": rng.choice((b"null", b"true", b"3", b'"x"', b"[]", b"{}", b"NaN", b"[1]")),
    }
    name = rng.choice(list(texts))
    path.write_bytes(texts[name])
    return f"{path.name} {name}"


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, HUGE)
    os.utime(path, (0, 0))  # the same in every run


def _socket(path: Path) -> None:
    short = Path(gettempdir(), f"fuzz-socket-{os.getpid()}")  # a socket's path has a hundred bytes at most
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(short))
    shutil.move(short, path)


def in_its_place(rng: Random, path: Path) -> str:
    """Something that is no regular file of its own, or an absurd one."""
    path.unlink(missing_ok=True)
    made: dict[str, Callable[[], object]] = {
        "a pipe": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "a link to nothing": lambda: path.symlink_to("nowhere"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link to /dev/zero": lambda: path.symlink_to("/dev/zero"),
        "a link out of the folder": lambda: path.symlink_to("/etc/passwd"),
        "a link to a secret beside": lambda: path.symlink_to(path.parent.parent / "foreign.txt"),
        "3 GB of nothing": lambda: _sparse(path),
        "an empty file": path.touch,
        "a socket": lambda: _socket(path),
        "no file": lambda: None,
    }
    name = rng.choice(list(made))
    made[name]()
    return f"{name} as {path.name}"
