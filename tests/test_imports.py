"""Imports point down only: the layers of the library, as a table, and a test that holds every file to them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A unit is a module or a package of moeify/. It may import the units of the rows below its own, and none of its own
# row: what two of one row share belongs further down.
LAYERS = (
    "__main__",
    "cli",
    "export report",
    "proving",
    "hub",
    "conversion parallel training",
    "planning",
    "contract families passes tracing",
    "layers",
    "methods routers",
    "checkpoint routing",
    "arguments plan",
    "config pretrained",
    "files measure ranks runtime",
    "colors errors kernels names seeding",
)
DEPTH = {unit: depth for depth, layer in enumerate(LAYERS) for unit in layer.split()}

KERNELS_MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}
ONLY_CLI_MAY_IMPORT = {"click", "rich"}
RUNTIME_MAY_NOT_IMPORT = {"torch", "transformers"}  # it runs exported files where neither is installed


def unit_of(path: Path) -> str:
    """The unit that a file belongs to; its path is relative to the root of the repository."""
    inside = path.parts[1] if path.parts[0] == "moeify" else path.parts[0]
    return inside.removesuffix(".py")


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """Every module that the file can import, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative import"
            if node.module == "moeify":
                yield from (f"moeify.{alias.name}" for alias in node.names)
            else:
                yield node.module


def violation(unit: str, module: str) -> str | None:
    """Why `unit` may not import `module`, or None if it may."""
    package, _, inside = module.partition(".")
    if package != "moeify":
        if unit == "kernels" and package not in KERNELS_MAY_IMPORT:
            return f"kernels import torch and triton only, not {package}"
        if unit != "cli" and package in ONLY_CLI_MAY_IMPORT:
            return f"only cli may import {package}, not {unit}"
        if unit == "runtime" and package in RUNTIME_MAY_NOT_IMPORT:
            return f"runtime works without {package}"
        return None
    target = inside.split(".")[0]
    if target in {unit, "__version__"}:
        return None
    if target not in DEPTH:
        return f"{unit} imports {module}: name the module that defines it, and give that a row in LAYERS"
    if unit in DEPTH and DEPTH[target] <= DEPTH[unit]:
        return f"{unit} imports {target}, which is not below it"
    return None


def violations(unit: str, source: str) -> list[str]:
    reasons = (violation(unit, module) for module in imported_modules(ast.parse(source)))
    return [reason for reason in reasons if reason]


def library_files() -> list[Path]:
    """All files of the library, but not the public face: it imports each name when it is first used."""
    files = [path for folder in ("moeify", "passes", "kernels") for path in (ROOT / folder).rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in files if path != ROOT / "moeify/__init__.py")


def test_every_unit_has_its_row() -> None:
    units = {unit_of(path) for path in library_files()}
    assert sorted(units - set(DEPTH)) == [], "say in LAYERS where these stand"
    assert sorted(set(DEPTH) - units) == [], "these are gone: take them out of LAYERS"


@pytest.mark.parametrize("path", library_files(), ids=str)
def test_imports_point_down(path: Path) -> None:
    assert violations(unit_of(path), (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("planning", "from moeify.conversion.checkpoint import convert_checkpoint"),
        ("training", "from moeify.conversion.module import convert"),
        ("conversion", "from moeify.hub.loading import load"),
        ("routing", "from moeify.routers.softmax import Softmax"),
        ("config", "import moeify.routers"),
        ("methods", "from moeify.routers.base import Router"),
        ("layers", "def forward():\n    from moeify.passes.base import PassResult"),
        ("layers", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import moeify.planning"),
        ("plan", "from moeify import MoEConfig"),
        ("plan", "import moeify"),
        ("kernels", "from moeify.errors import MoeifyError"),
        ("kernels", "import numpy"),
        ("runtime", "def run():\n    import torch"),
        ("proving", "from rich.table import Table"),
    ],
)
def test_an_import_that_does_not_point_down_is_found(unit: str, source: str) -> None:
    assert len(violations(unit, source)) == 1


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("cli", "import click\nfrom moeify import __version__\nfrom moeify.conversion.module import convert"),
        ("passes", "from moeify.passes.base import PassResult\nfrom moeify import layers"),
        ("layers", "import numpy\nfrom moeify.kernels.ops import experts"),
        ("kernels", "import math\nimport torch\nfrom triton import language\nfrom moeify.kernels.layout import Layout"),
    ],
)
def test_an_import_that_points_down_is_allowed(unit: str, source: str) -> None:
    assert violations(unit, source) == []
