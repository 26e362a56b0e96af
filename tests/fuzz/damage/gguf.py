"""GGUF files written by hand, so that every count, type, offset and length can be wrong."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from tests.fuzz.damage import files

U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10
HIDDEN, INTERMEDIATE, WORDS, LAYERS = 32, 64, 8, 1
_ALIGNMENT = 32


@dataclass
class Gguf:
    """What stands in a file; `bytes()` writes it as it is told to.

    Attributes:
        metadata: Key to (type, bytes of the value).
        tensors: Name to (dimensions, the smallest first; type; offset, None for where it belongs).
        version: Of the format.
        counts: Of tensors and entries, None for the true ones.
        cut: Bytes of tensor data to leave out.
    """

    metadata: dict[str, tuple[int, bytes]]
    tensors: dict[str, tuple[tuple[int, ...], int, int | None]]
    version: int = 3
    counts: tuple[int | None, int | None] = (None, None)
    cut: int = 0
    rng: Random = field(default_factory=lambda: Random(0))

    def bytes(self) -> bytes:
        tensors, entries = self.counts
        out = b"GGUF" + struct.pack("<I", self.version)
        out += struct.pack("<QQ", len(self.tensors) if tensors is None else tensors,
                           len(self.metadata) if entries is None else entries)  # fmt: skip
        for key, (kind, value) in self.metadata.items():
            out += text(key) + struct.pack("<I", kind) + value
        place, body = 0, b""
        for name, (dims, kind, offset) in self.tensors.items():
            out += text(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", n) for n in dims)
            out += struct.pack("<IQ", kind, place if offset is None else offset)
            if offset is None and kind == 0:
                count = 1
                for n in dims:
                    count *= n
                body += struct.pack(f"<{count}f", *(self.rng.gauss(0, 0.2) for _ in range(count)))
                body += b"\0" * (-len(body) % _ALIGNMENT)
                place = len(body)
        out += b"\0" * (-len(out) % _ALIGNMENT) + body
        return out[: len(out) - self.cut]


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def u32(value: int) -> tuple[int, bytes]:
    return U32, struct.pack("<I", value)


def array(kind: int, values: list[bytes], count: int | None = None) -> tuple[int, bytes]:
    return ARRAY, struct.pack("<IQ", kind, len(values) if count is None else count) + b"".join(values)


def words(kind: str) -> dict[str, tuple[int, bytes]]:
    """The entries of a tokenizer."""
    names = ["w", *"0123", "w0", "w1", "w2"]
    return {
        "model": (STRING, text(kind)),
        "tokens": array(STRING, [text(name) for name in names]),
        "scores": array(F32, [struct.pack("<f", -i) for i in range(WORDS)]),
        "token_type": array(5, [struct.pack("<i", 1) for _ in range(WORDS)]),
        "merges": array(STRING, [text("w 0"), text("w 1")]),
        "bos_token_id": u32(1), "eos_token_id": u32(2), "unknown_token_id": u32(0),
    }  # fmt: skip


def whole(tokenizer: str | None = "gpt2") -> Gguf:
    """A llama of one layer, with a tokenizer of a kind."""
    numbers = {"block_count": LAYERS, "context_length": 32, "embedding_length": HIDDEN, "vocab_size": WORDS,
               "feed_forward_length": INTERMEDIATE, "attention.head_count": 2,
               "attention.head_count_kv": 1}  # fmt: skip
    metadata = {"general.architecture": (STRING, text("llama"))}
    metadata |= {f"llama.{name}": u32(value) for name, value in numbers.items()}
    metadata["llama.attention.layer_norm_rms_epsilon"] = (F32, struct.pack("<f", 1e-6))
    metadata["llama.rope.freq_base"] = (F32, struct.pack("<f", 10000.0))
    if tokenizer:
        metadata |= {f"tokenizer.ggml.{part}": value for part, value in words(tokenizer).items()}
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (HIDDEN, WORDS), "output": (HIDDEN, WORDS), "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,), "blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (HIDDEN, HIDDEN // 2),
        "blk.0.attn_v": (HIDDEN, HIDDEN // 2), "blk.0.attn_output": (HIDDEN, HIDDEN), "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (HIDDEN, INTERMEDIATE), "blk.0.ffn_up": (HIDDEN, INTERMEDIATE),
        "blk.0.ffn_down": (INTERMEDIATE, HIDDEN),
    }  # fmt: skip
    return Gguf(metadata, {f"{name}.weight": (shape, 0, None) for name, shape in shapes.items()})


def small_gguf(path: Path) -> None:
    path.write_bytes(whole().bytes())


def counts(rng: Random, path: Path) -> str:
    made = whole()
    made.counts = rng.choice(((2**40, None), (None, 2**40), (2**63, None), (0, None), (None, 0), (1, None), (None, 2)))
    made.version = rng.choice((3, 3, 3, 2, 1, 0, 2**31))
    path.write_bytes(made.bytes())
    return f"counts {made.counts}, version {made.version}"


def metadata(rng: Random, path: Path) -> str:
    """One entry is another, gone, or of another type."""
    made = whole()
    key = rng.choice((*made.metadata, "llama.rope.dimension_count", "general.alignment", "split.count"))
    odd: tuple[tuple[int, bytes], ...] = (
        *(u32(n) for n in (0, 1, 3, 7, 2**20, 2**31, 2**32 - 1)),
        (U64, struct.pack("<Q", 2**63)),
        (F32, struct.pack("<f", float("nan"))),
        (STRING, text(rng.choice(("", "gpt2", "x\nError: y", "\ud800", "[/b]\x1b[1m", "bert")))),
        (STRING, struct.pack("<Q", 2**62)),
        (ARRAY, struct.pack("<IQ", 4, rng.choice((0, 2**31, 2**40, 2**62)))),
        (ARRAY, struct.pack("<IQ", 9, 1) * 2000),
        (99, b"\0" * 8),
    )
    if rng.random() < 0.15:
        made.metadata.pop(key, None)
        said = "missing"
    else:
        made.metadata[key] = rng.choice(odd)
        said = f"{made.metadata[key][0]}: {made.metadata[key][1][:24].hex()}"
    path.write_bytes(made.bytes())
    return f"{key} {said}"


def tensor(rng: Random, path: Path) -> str:
    """One tensor has another shape, type, place or name, or is not there."""
    made = whole()
    name = rng.choice(list(made.tensors))
    dims, kind, _ = made.tensors[name]
    odd: tuple[tuple[tuple[int, ...], int, int | None], ...] = (
        (dims[::-1], kind, None), ((*dims, 1), kind, None), ((*dims, 0), kind, 0), ((2**40, 2**40), kind, 0),
        ((2**32, 2**32), kind, 0), ((), kind, 0), (dims * 3, kind, 0), (dims, 1, 0), (dims, 8, 0), (dims, 2, 0),
        (dims, 77, 0), (dims, kind, 0), (dims, kind, 2**63), (dims, kind, 3), (dims, kind, 2**30),
    )  # fmt: skip
    change = rng.choice(odd)
    match rng.choice(("change", "change", "change", "missing", "extra", "twice")):
        case "missing":
            del made.tensors[name]
            said = "missing"
        case "extra":
            odd_name = rng.choice(("blk.1.ffn_up.weight", "x\nError: y", "[/b]\x1b", "\ud800", "y" * 5000))
            made.tensors[odd_name] = made.tensors[name]
            said = f"also as {odd_name[:40]!r}"
        case "twice":
            made.tensors[name + "\0"] = made.tensors[name]
            raw = made.bytes().replace(text(name + "\0"), struct.pack("<Q", len(name)) + name.encode(), 1)
            path.write_bytes(raw)
            return f"{name} twice"
        case _:
            made.tensors[name] = change
            said = f"is {change}"
    path.write_bytes(replace(made, cut=rng.choice((0, 0, 0, 32))).bytes())
    return f"{name} {said}"


def tokenizer(rng: Random, path: Path) -> str:
    """A tokenizer in the metadata; one part of it is wrong, or none."""
    kind = rng.choice(("llama", "gpt2", "bert", "t5", "rwkv", "no such", ""))
    made, entries = whole(None), words(kind)
    odd = (
        u32(rng.choice((0, WORDS, 2**31, 2**32 - 1))), (F32, struct.pack("<f", float("inf"))), (7, b"\7"),
        (STRING, text(rng.choice(("", "x", "{% for i in x %}", "\ud800")))), array(STRING, [text("a\nb\x1b[1m")] * 3),
        array(STRING, []), array(STRING, [text("w0")] * WORDS), array(STRING, [text("")] * WORDS),
        array(STRING, [struct.pack("<Q", 2) + b"\xff\xfe"] * WORDS), array(STRING, [text("w0")], 2**40),
        array(F32, [struct.pack("<f", float("nan"))] * WORDS), array(5, [struct.pack("<i", -(2**31))] * WORDS),
    )  # fmt: skip
    part = rng.choice((*entries, "chat_template", "pre", "add_bos_token", "padding_token_id"))
    if part in entries and rng.random() < 0.3:
        del entries[part]
        said = "missing"
    else:
        entries[part] = rng.choice(odd)
        said = f"{entries[part][0]}: {entries[part][1][:24].hex()}"
    made.metadata |= {f"tokenizer.{part}" if part == "chat_template" else f"tokenizer.ggml.{part}": value
                      for part, value in entries.items()}  # fmt: skip
    path.write_bytes(made.bytes())
    return f"tokenizer {kind!r} with {part} {said}"


def bits(rng: Random, path: Path) -> str:
    start, stop = rng.choice(((0, 24), (24, 400), (0, 1500), (0, None)))
    return files.flip(rng, path, start, stop)


def cut(rng: Random, path: Path) -> str:
    return rng.choice((files.truncate, files.append, files.overwrite))(rng, path)


def place(rng: Random, path: Path) -> str:
    return files.in_its_place(rng, path)
