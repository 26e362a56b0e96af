"""Draw the tree in README.md from the first line of every module's docstring (`make docs`)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 118
TOP = {
    "moeify": "what users import and type",
    "passes": "graph in, graph out; imported as moeify.passes",
    "kernels": "tensors in, tensors out; imported as moeify.kernels; knows nothing of models or graphs",
}
BESIDE = {
    "tests/": "mirrors the three",
    "examples/": "programs that run, each with what it measured",
    "benchmarks/": "side by side with what people use today",
    "docs/": "pages and the programs that write them",
}
BLOCK = re.compile(r"(?<=^## The tree\n\n```\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)


def summary(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.split(r"(?<=[a-z)`])[.;](?:\s|$)", " ".join(text.split("\n\n")[0].split()))[0].rstrip(".")


def entries(folder: Path) -> list[tuple[str, str]]:
    """Modules and packages of a folder, by name."""
    found = [(path.name, summary(path)) for path in folder.glob("*.py") if not path.name.startswith("__")]
    packages = [path for path in folder.iterdir() if (path / "__init__.py").exists() and not path.is_symlink()]
    return sorted(found + [(f"{path.name}/", summary(path / "__init__.py")) for path in packages])


def line(indent: int, name: str, text: str) -> str:
    """One row, cut where it would become too long."""
    row = f"{' ' * indent}{name:<{28 - indent}}{text}"
    return row if len(row) <= WIDTH else row[: WIDTH - 1].rsplit(" ", 1)[0] + " …"


def draw() -> str:
    """The whole tree."""
    rows = []
    for folder, text in TOP.items():
        rows.append(line(0, f"{folder}/", text))
        rows += [line(2, name, what) for name, what in entries(ROOT / folder)]
    rows += [line(0, name, what) for name, what in BESIDE.items() if (ROOT / name).exists()]
    return "\n".join(rows) + "\n"


def main() -> None:
    """Write the tree into README.md."""
    readme = ROOT / "README.md"
    readme.write_text(BLOCK.sub(lambda _: draw(), readme.read_text()))


if __name__ == "__main__":
    main()
