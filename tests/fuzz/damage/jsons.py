"""JSON that is well formed and says something else."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

Json = object
NESTED: Json = json.loads("[" * 200 + "]" * 200)
ODD: tuple[Json, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, 2**31, 2**63, 10**12, 10**30, 1e308, float("nan"), float("inf"),
    "", "x", "../x", "/etc/passwd", "a\nError: b", "[/b]\x1b[1m", "\ud800", "\u202e", "a\0b", "x" * 5000, "__name__",
    [], {}, [None], [1, "x"], {"a": None}, [[]], NESTED, {"x" * 300: 1},
)  # fmt: skip


def _places(data: Json, depth: int = 0) -> list[tuple[dict[str, Json] | list[Json], str | int]]:
    """Every entry at every depth, as its container and its key."""
    found: list[tuple[dict[str, Json] | list[Json], str | int]] = []
    if depth > 20:
        return found
    if isinstance(data, dict):
        for key, value in data.items():
            found += [(data, key), *_places(value, depth + 1)]
    elif isinstance(data, list):
        for number, value in enumerate(data):
            found += [(data, number), *_places(value, depth + 1)]
    return found


def near(rng: Random, value: Json) -> Json:
    """A value of the same kind: the damage that checks of types do not see."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((0, -value, value + 1, value - 1, 2 * value, value // 2, 10**6, 2**31))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + "x", value.upper(), "", value + "\n"))
    if isinstance(value, list):
        return rng.choice(([*value, *value], value[:-1], value[::-1], [value]))
    return rng.choice(ODD)


def mutate(rng: Random, data: Json, names: tuple[str, ...] = ()) -> str:
    """Change one entry, or take one away, or add one.

    Args:
        rng: Where choices come from.
        data: A document; it is changed in place.
        names: Entries that the document may have, at its top, besides those that it has.
    """
    places = _places(data)
    if isinstance(data, dict):
        places += [(data, name) for name in names]
    if not places:
        return "nothing to change"
    container, key = rng.choice(places)
    shown = f"{key!r}"[:60]
    if isinstance(container, dict) and isinstance(key, str):
        if rng.random() < 0.2:
            container.pop(key, None)
            return f"without {shown}"
        value = near(rng, container.get(key)) if rng.random() < 0.4 else rng.choice(ODD)
        container[key] = value
    else:
        assert isinstance(container, list) and isinstance(key, int)
        value = container[key] = rng.choice(ODD)
    return f"{shown} is {value!r}"[:160]


def of_values(rng: Random, path: Path, names: tuple[str, ...] = ()) -> str:
    """Change a file that holds JSON."""
    data = json.loads(path.read_text())
    changes = [mutate(rng, data, names) for _ in range(rng.choice((1, 1, 1, 2)))]
    path.write_text(json.dumps(data))
    return f"{path.name}: {', '.join(changes)}"


def set_entry(path: Path, name: str, value: Json) -> str:
    """Set one entry at the top of a file that holds an object."""
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, name: value}))
    return f"{path.name}: {name!r} is {value!r}"[:160]
