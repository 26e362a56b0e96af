from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from moeify.report.data import Report
from moeify.report.render import page
from tests.moeify.report import small

TIMES, NONE = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
REPORTS: dict[str, Callable[[], Report]] = {
    "model": small.report,
    "run": small.run_report,
    "nothing": lambda: Report("x", "1", "2026-01-01"),
}


@pytest.mark.parametrize("kind", REPORTS)
def test_a_page_is_whole_and_loads_nothing(kind: str) -> None:
    html = page(REPORTS[kind]())
    found = small.Page(html)
    for _, attributes in found.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert "http" not in html and "url(" not in html and "@import" not in html


@pytest.mark.parametrize("kind", ["model", "run"])
def test_every_plot_says_what_it_is_and_has_its_table(kind: str) -> None:
    found = small.Page(page(REPORTS[kind]()))
    plots = [attributes for tag, attributes in found.elements if tag == "svg"]
    maps = [attributes for attributes in plots if "data-table" in attributes]
    assert len(maps) == {"model": 6, "run": 1}[kind]
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in plots)
    for attributes in maps:
        across, down = map(int, str(attributes["data-size"]).split())
        table = found.tables[str(attributes["data-table"])]
        assert len(table) == down + 1 and {len(row) for row in table} == {across + 1}
    assert len(plots) - len(maps) == {"model": 0, "run": 1}[kind]  # one curve has two points
    assert "curves" in found.tables or kind == "model"


@pytest.mark.parametrize("kind", ["model", "run"])
def test_names_with_markup_are_text(kind: str) -> None:
    found = small.Page(page(REPORTS[kind]()))
    assert sum(tag == "script" for tag, _ in found.elements) == {"model": 2, "run": 1}[kind]
    assert found.text.count(small.EVIL) >= 3
    assert not any("alert" in program for name, program in found.data.items() if name != "choices")


def test_the_page_shows_the_numbers_of_the_json() -> None:
    made = small.report()
    found, data = small.Page(page(made)), json.loads(json.dumps(made.to_dict()))
    loads = [row[1:] for row in found.tables["load-1"][1:]]
    assert loads == [[f"{times:.2f}" for times in layer["load"]] for layer in data["routing"]]
    assert [row[0] for row in found.tables["load-1"][1:]] == ["0", "2"]
    assert found.tables["layers"][1] == [
        "0",
        f"2.25{TIMES}",
        f"0.00{TIMES}",
        "0.500",
        "1",
        "1",
        "12.5%",
        "1.5",
        "3.25",
        "2.5",
    ]
    assert found.tables["together-1"][2][1:] == ["0.25", "1", "0.25"]
    assert found.tables["cosine-1"][1][1:] == ["1", "0.5", "0.25"]
    assert found.tables["distance-1"][1][1:] == ["0", "0.01", "0.02"]
    assert found.tables["pairs"][1] == ["0", f"0 and 2, 1.75{TIMES}"]
    assert found.tables["tokens"][1:] == [[small.EVIL, "1", "1"], ["⏎", NONE, NONE], [" b", "2", "2"]]
    assert found.tables["proofs"][1][1:] == ["✗ differs", "1", "1.0e-03", "2.5e-01", "1e-02", "50.0%", "2"]
    assert found.tables["proof-1"][1] == ["model.layers.0.mlp", "1.00e-03", "1e-12", "float64"]
    assert found.tables["cost"][1:] == [
        ["this model", "1.0k", "500", "4.0 kB", "900"], ["dense", "400", "400", "1.6 kB", "800"],
    ]  # fmt: skip
    assert found.tables["parallel"][1] == ["3", "10 B", "20 B", "500 ms", small.EVIL]
    chosen = json.loads(found.data["choices"])
    assert [layer["weights"] for layer in chosen] == [layer["weights"] for layer in data["text"]["layers"]]
    assert "dense 14.5" in found.text


def test_the_page_of_a_run_shows_its_numbers() -> None:
    found = small.Page(page(small.run_report()))
    assert found.tables["curves"] == [["step", "loss", small.EVIL], ["1", "5", NONE], ["3", "4", "1"]]
    assert found.tables["history-1"] == [["expert", "1", "3"], ["0", "1.00", "0.00"], ["1", "1.00", "2.00"]]


def test_equal_experts_are_one_sentence() -> None:
    made = small.report()
    copies = tuple(replace(layer, farthest=(0, 1, 1.0), distance=()) for layer in made.weights)
    found = small.Page(page(replace(made, weights=copies)))
    assert "all experts hold equal weights" in found.text and "cosine-1" not in found.tables


def test_light_and_dark_pages_have_colors_of_enough_contrast() -> None:
    """WCAG AA: 4.5 for text."""
    css = re.search(r"<style>(.*?)</style>", page(small.run_report()), re.DOTALL)
    assert css
    light, dark = css[1].split("prefers-color-scheme: dark")
    for style in (light, dark):
        colors = dict(re.findall(r"--(paper|ink|muted|accent|good|bad): (#[0-9a-f]{6})", style))
        assert len(colors) == 6
        paper = luminance(colors.pop("paper"))
        for name, color in colors.items():
            low, high = sorted((paper, luminance(color)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, name


def luminance(color: str) -> float:
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
