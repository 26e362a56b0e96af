"""Stand-ins for packages that an engine imports, and that nothing uses which is run here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock


class StandIns(MetaPathFinder, Loader):
    """What is asked last for modules of packages that are not installed.

    Args:
        packages: Their names.
    """

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find a module of such a package."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> Any:
        """Return something that has every name."""
        return MagicMock(name=spec.name, __path__=[], __spec__=spec, __version__="99.0")

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing."""
