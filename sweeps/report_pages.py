"""Reports in a real browser: they load without an error or a request, fast, and pictures are kept to look at.

    python -m sweeps.report_pages OUT [REPORT.html …]

Without reports it draws made-up ones: a large model of 30 layers with 128 experts, and a run. It needs Chromium on the
PATH and the package playwright, which is no part of `.[dev]`. OUT gets pictures at two widths in both color schemes,
and a PDF.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from moeify.report.data import LayerRouting, PassageLayer, Report
from moeify.report.findings import findings
from moeify.report.render import page
from tests.moeify.report import small

LAYERS, EXPERTS, TOP_K, TOKENS = 30, 128, 8, 120
WIDTHS, SCHEMES = (1200, 390), ("light", "dark")
INTERACTIVE = 1000  # milliseconds, at most
_TIME = "performance.getEntriesByType('navigation')[0].domInteractive"
_OVERFLOW = "document.documentElement.scrollWidth - innerWidth"


def large(rng: Random) -> Report:
    """A model with many experts, which are used unevenly."""
    names = [f"model.layers.{n}.mlp" for n in range(LAYERS)]
    made = small.report()
    assert made.text is not None
    chosen = tuple(PassageLayer(name, tuple(tuple(rng.sample(range(EXPERTS), TOP_K)) for _ in range(TOKENS)),
                                ((1 / TOP_K,) * TOP_K,) * TOKENS) for name in names)  # fmt: skip
    text = replace(made.text, passage=tuple(f" token{n}" for n in range(TOKENS)), layers=chosen)
    layers = tuple({**made.layers[0], "name": name, "experts": EXPERTS, "top_k": TOP_K} for name in names)
    made = replace(made, layers=layers, text=text, routing=tuple(_routing(rng, name) for name in names), weights=())
    return replace(made, findings=findings(made))


def _routing(rng: Random, name: str) -> LayerRouting:
    drawn = [rng.gammavariate(0.8, 1) if n else 0.0 for n in range(EXPERTS)]
    load = tuple(EXPERTS * times / sum(drawn) for times in drawn)
    return replace(small.routing(name, load), experts=EXPERTS, top_k=TOP_K, together=(), pairs=())


def look(file: Path, out: Path, browser: Any) -> list[str]:
    """Open a page at all widths, and return what is wrong with it."""
    wrong: list[str] = []
    for scheme in SCHEMES:
        for width in WIDTHS:
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            tab, where = context.new_page(), f"{file.name} {scheme} {width}"
            tab.on("pageerror", partial(_failed, wrong, where))
            tab.on("request", partial(_asked, wrong, where))
            tab.goto(file.resolve().as_uri())
            took, over = tab.evaluate(_TIME), tab.evaluate(_OVERFLOW)
            print(f"{where}: {took:.0f} ms to interactive, {file.stat().st_size / 1e6:.2f} MB")
            wrong += [f"{where}: {took:.0f} ms to interactive"] if took > INTERACTIVE else []
            wrong += [f"{where}: {over} pixels too wide"] if over > 0 else []
            tab.screenshot(path=out / f"{file.stem}-{scheme}-{width}.png", full_page=True)
            context.close()
    printed = browser.new_page()
    printed.goto(file.resolve().as_uri())
    printed.pdf(path=out / f"{file.stem}.pdf", format="A4")
    return wrong


def _failed(wrong: list[str], where: str, error: object) -> None:
    wrong.append(f"{where}: {error}")


def _asked(wrong: list[str], where: str, asked: Any) -> None:
    if not asked.url.startswith(("file:", "data:")):
        wrong.append(f"{where}: asks for {asked.url}")


def main(out: Path, files: list[Path]) -> int:
    """Look at reports; return how many things are wrong."""
    out.mkdir(parents=True, exist_ok=True)
    if not files:
        made = {"large": large(Random(0)), "small": small.report(), "run": small.run_report()}
        files = [out / f"{name}.html" for name in made]
        for file, report in zip(files, made.values(), strict=True):
            file.write_text(page(report))
    started: Any = import_module("playwright.sync_api").sync_playwright()
    with started as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        wrong = [line for file in files for line in look(file, out, browser)]
        browser.close()
    for line in wrong:
        print(line)
    return len(wrong)


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]), 1))
