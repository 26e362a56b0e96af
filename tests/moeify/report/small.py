"""A small report of made-up numbers, and a page taken apart."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from moeify.report.data import (
    Conversion,
    Costs,
    Curve,
    LayerProof,
    LayerRouting,
    LayerWeights,
    LoadHistory,
    Pair,
    PassageLayer,
    Proof,
    Ranks,
    Report,
    Size,
    Text,
    Training,
)
from tests.moeify import tiny

EVIL = "<script>alert('x')</script>&\"'"
LAYERS = ("model.layers.0.mlp", "model.layers.2.mlp")


def routing(name: str, load: tuple[float, ...]) -> LayerRouting:
    idle = tuple(n for n, times in enumerate(load) if times == 0)
    over = tuple(n for n, times in enumerate(load) if times > 2)
    together = tuple(tuple(1.0 if a == b else 0.25 for b in range(3)) for a in range(3))
    return LayerRouting(name, 3, 2, 14, load, 0.5, 0.125, idle, over, 1.5, 3.25, {"balance": 2.5}, together,
                        (Pair(0, 2, 1.75),))  # fmt: skip


def report() -> Report:
    """Every section, with names that are markup."""
    passage = (EVIL, "\n", " b")
    chosen = tuple(PassageLayer(name, ((1, 0), (), (2, 1)), ((0.75, 0.25), (), (0.5, 0.5))) for name in LAYERS)
    layer: dict[str, Any] = {"name": LAYERS[0], "router": EVIL, "experts": 3, "top_k": 2, "hidden": 4,
                             "intermediate": 5, "shared_intermediate": 0, "count_params": 9}  # fmt: skip
    cosine = ((1.0, 0.5, 0.25), (0.5, 1.0, 0.125), (0.25, 0.125, 1.0))
    proof = Proof("now", False, 0.25, 1e-2, 0.5, 2, (LayerProof(LAYERS[0], 1e-3, "float64", 1e-12),))
    return Report(
        title=EVIL,
        version="1",
        made="2026-01-02T03:04:05+00:00",
        model_type=EVIL,
        engines=("transformers",),
        notes=(EVIL,),
        findings=(EVIL,),
        layers=(layer, {**layer, "name": LAYERS[1]}),
        conversion=Conversion("llama", EVIL, 2, "model.layers.{0,2}.mlp", {"method": EVIL}, "BF16", (EVIL,)),
        costs=Costs(Size(1000, 500, 4000, 900), Size(400, 400, 1600, 800), {"float32": 4000}, "Assumed.",
                    (Ranks(3, 10, 20, 0.5, EVIL),)),
        proofs=(proof,),
        text=Text(EVIL, 7, 15.5, 14.5, passage, chosen),
        routing=(routing(LAYERS[0], (0.0, 0.75, 2.25)), routing(LAYERS[1], (1.0, 1.0, 1.0))),
        weights=tuple(LayerWeights(name, 0.3, (0, 1, 0.5), (1, 2, 0.125), cosine, (0.0, 0.01, 0.02))
                      for name in LAYERS),
    )  # fmt: skip


def run_report() -> Report:
    training = Training((1, 3), (Curve("loss", (5.0, 4.0)), Curve(EVIL, (None, 1.0))), (1, 3),
                        (LoadHistory(EVIL, ((1.0, 0.0), (1.0, 2.0))),), 4)  # fmt: skip
    return Report(EVIL, "1", "2026-01-02T03:04:05+00:00", training=training)


class Page(HTMLParser):
    """The elements of a page, the rows of its tables by id, and the text outside of styles and programs."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.open: list[str] = []
        self.text = ""
        self.data: dict[str, str] = {}
        self._table = self._script = ""
        self.feed(html)
        self.close()
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.elements.append((tag, found))
        if tag in {"meta", "link", "input", "br"}:
            return
        self.open.append(tag)
        if tag == "table":
            self._table = str(found.get("id"))
            assert self._table not in self.tables, "an id is there twice"
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in {"td", "th"}:
            self.tables[self._table][-1].append("")
        elif tag == "script":
            self._script = str(found.get("id"))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.data[self._script] = self.data.get(self._script, "") + data
        elif "style" not in self.open:
            self.text += data
            if {"td", "th"} & set(self.open):
                self.tables[self._table][-1][-1] += data


def save_tokenizer(folder: Path) -> None:
    """Put a tokenizer of the words w0, w1, … beside a tiny model."""
    tiny.tokenizer("<pad>", "<bos>", "<eos>", pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def save_dense(folder: Path, name: str = "llama", *, tokenizer: bool = True) -> Path:
    tiny.save(tiny.build(name), folder)
    if tokenizer:
        save_tokenizer(folder)
    return folder
