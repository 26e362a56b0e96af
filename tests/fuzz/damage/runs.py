"""Damage to the log of a training run: lines that are whole and say what none says."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

_ODD: tuple[object, ...] = (
    None,
    -1,
    10**200,
    1e308,
    float("nan"),
    "x",
    [],
    {},
    [[1]],
    {"a": 1},
    True,
    "</script>",
    [10**18, 0],
)


def line(rng: Random, path: Path) -> str:
    """Another value in a window, or in a layer of it."""
    lines = path.read_text().splitlines()
    place = rng.randrange(len(lines))
    row = json.loads(lines[place])
    holder = rng.choice((row, row["layers"], row["layers"]["layers.0"], row["layers"]["layers.1"]["losses"]))
    name, value = rng.choice((*holder, "<b>")), rng.choice(_ODD)
    holder[name] = value
    lines[place] = json.dumps(row)
    path.write_text("\n".join(lines))
    return f"line {place} with {name} = {value!r}"
