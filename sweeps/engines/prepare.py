"""What engines are given: checkpoints of every native family, with experts that are copies and that differ.

The models are random and as small as engines allow: heads of 32 dimensions and more.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeify.errors import RefusedError
from moeify.families.table import FAMILIES
from sweeps.dense_sources import SOURCES, build
from sweeps.engines import tokenizers
from sweeps.engines.program import EXPECTED, MODEL, TOKENS
from sweeps.families import NOISE, Measured, load_stock

SCALE = 4
# Sources whose logits are computed in float64: those that transformers computes in float32 are 1.6e-5 away from them.
WIDE = ("qwen3_5_text",)
KINDS = {"copies": replace(NOISE, method="copy"), "differing": NOISE}


@dataclass(frozen=True)
class Prepared:
    """A checkpoint in one family.

    Attributes:
        source: The dense model, one of `sweeps.dense_sources.SOURCES`.
        family: The target.
        kind: "copies": its logits are those of the dense model. "differing": those of transformers.
        folder: Where it lies, with the logits.
    """

    source: str
    family: str
    kind: str
    folder: Path


def prepare(name: str, room: Path, families: set[str]) -> list[Prepared]:
    """Write a source in each family that it fits, and the logits that engines must give."""
    dense = build(name, SCALE, vocab_size=tokenizers.VOCABULARY)
    (room / "src").mkdir(parents=True)
    tokenizers.write(room / "src")
    source, found = Measured(dense, room), []
    wide = name in WIDE
    np.save(room / EXPECTED, _logits(dense, wide=wide))
    for family in (family for family, held in FAMILIES.items() if SOURCES[name][0] in held.sources):
        for kind, config in KINDS.items() if not families or family in families else ():
            place = Prepared(name, family, kind, room / family / kind)
            try:
                source.convert(family, config)
            except RefusedError:
                continue
            place.folder.mkdir(parents=True)
            (room / "dst").rename(place.folder / MODEL)
            tokenizers.suit(place.folder / MODEL, family)
            if kind == "copies":
                os.link(room / EXPECTED, place.folder / EXPECTED)
            else:
                np.save(place.folder / EXPECTED, _logits(load_stock(place.folder / MODEL), wide=wide))
            found.append(place)
    return found


@torch.no_grad()
def _logits(model: Any, *, wide: bool) -> Any:
    counted = copy.deepcopy(model).double() if wide else model
    return counted(input_ids=torch.tensor([TOKENS])).logits[0].float().numpy()
