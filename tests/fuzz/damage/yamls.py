"""YAML that strangers wrote: recipes, and the front matter of model cards."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import yaml

from tests.fuzz.damage import files, jsons
from tests.fuzz.damage.code import MARKER

_CARD = {
    "license": "apache-2.0",
    "license_name": "some words",
    "license_link": "https://example.org/licence",
    "language": ["en", "no"],
    "tags": ["moe", "a tag"],
    "base_model": ["a/b"],
    "pipeline_tag": "text-generation",
    "model-index": [{"name": "x", "results": [{"metrics": [{"value": 1.5}]}]}],
}
_WORDS = (
    "---",
    "\n---\n",
    "x: y",
    "- x",
    "[x](javascript:y)",
    "<script>",
    "| x |",
    "a/b/c",
    "../b",
    "!!x",
    "*x",
    "no",
    "1e9",
)


def card(rng: Random, src: Path) -> str:
    """What stands beside the model as README.md."""
    path = (src if src.is_dir() else src.parent) / "README.md"
    data = json.loads(json.dumps(_CARD))
    said = jsons.mutate(rng, data) if rng.random() < 0.5 else _word(rng, data)
    front = _text(data).encode()
    if rng.random() < 0.4:
        said, front = _odd(rng, front)
    path.write_bytes(b"---\n" + front + b"\n---\n\n# A model\n\nWords.\n")
    if rng.random() < 0.2:
        said = rng.choice((files.flip, files.truncate, files.append, files.in_its_place))(rng, path)
    return f"card: {said}"[:200]


def _word(rng: Random, data: dict[str, object]) -> str:
    field, word = rng.choice(list(data)), rng.choice(_WORDS)
    data[field] = rng.choice((word, [word, word], {word: word}))
    return f"{field} is {data[field]!r}"


def recipe(rng: Random, path: Path, fields: dict[str, object], names: tuple[str, ...]) -> None:
    """Write a recipe that is damaged.

    Args:
        rng: Where choices come from.
        path: Of the recipe.
        fields: What a whole one says.
        names: Other fields that it may have.
    """
    for _ in range(rng.choice((0, 1, 1, 2))):
        jsons.mutate(rng, fields, names)
    text = _text(fields).encode()
    path.write_bytes(_odd(rng, text)[1] if rng.random() < 0.4 else text)
    if rng.random() < 0.1 and path.stat().st_size:
        rng.choice((files.flip, files.truncate, files.in_its_place))(rng, path)


def _text(data: object) -> str:
    """YAML in one of its two spellings; a lone surrogate has only one."""
    try:
        return str(yaml.safe_dump(data, allow_unicode=True, sort_keys=False))
    except UnicodeEncodeError:
        return json.dumps(data)


def _odd(rng: Random, text: bytes) -> tuple[str, bytes]:
    """YAML that no reader expects, or text that is none."""
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60))
    texts = {
        "with a tag that calls": f"x: !!python/object/apply:os.system ['touch {MARKER}']\n".encode() + text,
        "with a tag as a field": f"experts: !!python/object/new:os.system ['touch {MARKER}']\n".encode(),
        "of aliases of aliases": laughs.encode() + text,
        "with an alias of itself": b"experts: &x [*x]\n",
        "with merge keys": b"x: &x {experts: 2}\n<<: *x\n" + text,
        "of lists in lists": b"experts: " + b"[" * rng.choice((500, 20_000)),
        "of mappings in mappings": b"tags: " + b"{a: " * rng.choice((500, 20_000)),
        "with tabs": text.replace(b": ", b":\t"),
        "with a key twice": text + b"\n" + text,
        "with a list as key": b"? [a, b]\n: c\n" + text,
        "with a mapping as key": b"? {a: b}\n: c\n",
        "in UTF-16": text.decode().encode("utf-16"),
        "with NUL": text.replace(b":", b":\0", 1),
        "with control characters": b"\x1b[1mexperts\x07: 4\n" + text,
        "in other lines": text.replace(b"\n", b"\r\n"),
        "of two documents": text + b"\n---\n" + text,
        "of two million bytes": b"x: " + b"y" * 2_000_000,
        "of many fields": b"".join(b"x%d: 1\n" % number for number in range(20_000)),
        "of a word": rng.choice((b"null", b"3", b"x", b"[]",
                                 b"{}", b"- x", b"~", b"''", b"|", b"%", b"&a", b"*a", b"!")),
        "of nothing": b"",
    }  # fmt: skip
    name = rng.choice(list(texts))
    return f"{name}", texts[name]
