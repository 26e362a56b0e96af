"""Which test files can notice a change of a module: the one of its name, those beside it, and those that import it."""

from __future__ import annotations

import ast
from pathlib import Path

import moeify
from tests.test_mirror import covered_by, mirrored

Imports = dict[str, set[str]]


def module_of(path: str) -> str:
    """Return the name under which a file of the library is imported."""
    dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return dotted if dotted.startswith("moeify") else f"moeify.{dotted}"


class CoveringTests:
    """What imports what, in the library and in its tests.

    Args:
        root: The root of the repository.
        library: The files of the library, relative to it.
    """

    def __init__(self, root: Path, library: list[str]) -> None:
        self.root = root
        self.library = {module_of(path): path for path in library}
        self.imports: Imports = {}
        for name, file in self.library.items():
            self.imports[name] = self._imported(root / file)
        files = {path.relative_to(root).as_posix(): path for path in sorted((root / "tests").rglob("*.py"))}
        helpers = {name.removesuffix(".py").replace("/", "."): path for name, path in files.items()}
        shared = {name: self._imported(path) for name, path in helpers.items()}
        self.tests: Imports = {}
        for name, path in files.items():
            if path.name.startswith("test_"):
                used = _names(ast.parse(path.read_text())) & helpers.keys()
                self.tests[name] = self._imported(path).union(*(shared[helper] for helper in used))

    def _imported(self, path: Path) -> set[str]:
        """The modules of the library that a file imports itself, at its top, inside a function, or by a string."""
        tree = ast.parse(path.read_text())
        names = _names(tree)
        if path.name == "__init__.py" and path.parent != self.root / "moeify":  # a package may import by name
            package = module_of(path.parent.relative_to(self.root).as_posix())
            names |= {name for name in self.library if name.startswith(f"{package}.")}
        if "moeify" in names:
            faces = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            names |= {f"moeify.{home}" for face, home in moeify._HOME.items() if face in faces}
        return names & self.library.keys()

    def stages(self, path: str) -> list[list[str]]:
        """Return the test files to run on a changed module, in groups: each is further away from it than the last.

        First comes the test of its name, or what the table in tests/test_mirror.py has instead; then its folder's; then
        the tests that import it; then those that import what imports it, and so on.
        """
        folder = str(Path(mirrored(path)).parent)
        beside = {test for test in self.tests if str(Path(test).parent) == folder}
        groups = [{covered_by(path) or mirrored(path)}, beside]
        near, reached = {module_of(path)}, {module_of(path)}
        while near:
            groups.append({test for test, used in self.tests.items() if used & near})
            near = {name for name, used in self.imports.items() if used & near} - reached
            reached |= near
        stages, taken = [], set[str]()
        for group in groups:
            stages.append(sorted((group & self.tests.keys()) - taken))
            taken |= group
        return [stage for stage in stages if stage]


def _names(tree: ast.Module) -> set[str]:
    """Every dotted name that an import or a string may mean: `from a import b` is a and a.b."""
    found = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("moeify."):
            found.add(node.value)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found
