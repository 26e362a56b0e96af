"""The tree in README.md, drawn from the first line of every module's docstring."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES, WIDTH = 28, 118  # columns of the names, and of a row
SHORTEST = 15  # columns of a text that says something
BLOCK = re.compile(r"(?<=^## The tree\n\n```\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)

# The folders of the library, with every module.
LIBRARY = {
    "moeify": "what users import and type",
    "passes": "graph in, graph out; imported as moeify.passes",
    "kernels": "tensors in, tensors out; imported as moeify.kernels; knows nothing of models or graphs",
}
# kernels/ has no __init__.py, and so no docstrings of folders.
FOLDERS = {
    "kernels/gpu": "Triton kernels, and the host code that launches them",
    "kernels/tools": "Reports, tuning and self-checks of the kernels",
}
# What else the repository holds, and where the row of each file stands.
BESIDE = {
    "tests/": "mirrors the three: the test of passes/lower.py is tests/passes/test_lower.py",
    "examples/": "programs that run, each with what it measured: see examples/README.md",
    "benchmarks/": "side by side with what people use today: see benchmarks/README.md",
    "sweeps/": "programs that go over all model types, or over the code itself",
    "docs/": "pages, listed above",
}
PROGRAMS = ("sweeps",)  # of BESIDE: their files are listed, too


def summary(path: Path) -> str:
    """Return the first sentence of a module's docstring, or as much as fits: up to a colon, a parenthesis or a comma.

    Raises:
        ValueError: No part of it fits, or there is no docstring.
    """
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<! al)(?<! vs)\.(?:\s|$)", text)[0]
    for end in (r"$", r"[:;](?=\s)", r" \(", r",(?=\s)"):
        parts = [sentence[: match.start()] for match in re.finditer(end, sentence) if match.start() <= WIDTH - NAMES]
        fitting = [part for part in parts if len(part) >= SHORTEST and part.count("(") == part.count(")")]
        if fitting:
            return fitting[-1]
    raise ValueError(
        f"{path.relative_to(ROOT)}: its docstring's first sentence needs {len(sentence)} columns, expected "
        f"{SHORTEST} to {WIDTH - NAMES}: shorten it, or put a comma or colon where it may end"
    )


def rows(folder: Path, indent: int) -> list[str]:
    """Return the rows of a folder: files, and packages with their files below them."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_file(), path.name)):
        inside = path.relative_to(ROOT).as_posix()
        if path.suffix == ".py" and not path.name.startswith("__"):
            found.append(row(indent, path.name, summary(path)))
        elif path.is_dir() and not path.is_symlink() and any(path.glob("*.py")):
            text = FOLDERS[inside] if inside in FOLDERS else summary(path / "__init__.py")
            found += [row(indent, f"{path.name}/", text), *rows(path, indent + 2)]
    return found


def row(indent: int, name: str, text: str) -> str:
    """Return one row; the texts stand below each other."""
    return f"{' ' * indent}{name:<{NAMES - indent}}{text}"


def draw() -> str:
    """Return the whole tree."""
    drawn = []
    for folder, text in LIBRARY.items():
        drawn += [row(0, f"{folder}/", text), *rows(ROOT / folder, 2)]
    for name, text in BESIDE.items():
        drawn.append(row(0, name, text))
        if name.rstrip("/") in PROGRAMS:
            drawn += rows(ROOT / name, 2)
    return "\n".join(drawn) + "\n"


def main() -> None:
    """Write the tree into README.md."""
    readme = ROOT / "README.md"
    readme.write_text(BLOCK.sub(lambda _: draw(), readme.read_text()))


if __name__ == "__main__":
    main()
