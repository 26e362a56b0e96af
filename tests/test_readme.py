"""The tree that README draws is the tree on disk."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = re.compile(r"^## The tree$.*?^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def drawn_paths(tree: str) -> set[str]:
    """The paths of a tree drawn by indentation; names end where two spaces begin, and a line may hold several."""
    paths: set[str] = set()
    parents: list[tuple[int, str]] = []
    for line in filter(str.strip, tree.splitlines()):
        drawn = re.sub(r"[│├└─]", " ", line)
        indent = len(drawn) - len(drawn.lstrip())
        while parents and parents[-1][0] >= indent:
            parents.pop()
        folder = parents[-1][1] + "/" if parents else ""
        names = re.split(r"\s{2,}", drawn.strip())[0].replace(" · ", " ").split()
        paths.update(folder + name.rstrip("/") for name in names)
        if names[0].endswith("/"):
            parents.append((indent, folder + names[0].rstrip("/")))
    return paths


def readme_paths() -> set[str]:
    match = TREE.search((ROOT / "README.md").read_text())
    assert match, "README.md has no fenced block under '## The tree'"
    return drawn_paths(match.group(1))


def test_drawn_paths_reads_indentation_and_box_drawing() -> None:
    plain = "moeify/        for users\n    cli.py errors.py   two modules\n    methods/   copy, carve\nREADME.md\n"
    boxed = "moeify/        for users\n├── cli.py · errors.py   two modules\n└── methods/   copy, carve\nREADME.md\n"
    expected = {"moeify", "moeify/cli.py", "moeify/errors.py", "moeify/methods", "README.md"}
    assert drawn_paths(plain) == drawn_paths(boxed) == expected


def test_every_path_in_the_tree_exists() -> None:
    paths = readme_paths()
    assert paths
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_every_module_is_in_the_tree() -> None:
    modules = {path for folder in ("moeify", "passes", "kernels") for path in (ROOT / folder).glob("*.py")}
    packages = {path.parent for path in (ROOT / "moeify").glob("*/__init__.py") if not path.parent.is_symlink()}
    found = {path.relative_to(ROOT).as_posix() for path in modules | packages if not path.name.startswith("__")}
    assert sorted(found - readme_paths()) == []
