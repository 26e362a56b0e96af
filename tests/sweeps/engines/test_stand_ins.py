"""Packages that no run uses can be imported, with every name; the others are missing as ever."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import pytest

from sweeps.engines.stand_ins import StandIns


def test_a_package_that_is_not_installed_has_a_stand_in_with_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, StandIns(["no_such_package", "json"])])
    part: Any = import_module("no_such_package.part.of_it")
    assert part.anything.at_all() and part.__version__ == "99.0"
    assert import_module("json").loads("1") == 1, "what is installed is not replaced"
    with pytest.raises(ModuleNotFoundError):
        import_module("no_such_other")
    for name in [name for name in sys.modules if name.startswith("no_such_package")]:
        del sys.modules[name]
