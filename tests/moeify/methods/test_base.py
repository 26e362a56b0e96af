from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moeify
from moeify.config import MoEConfig
from moeify.config.choice import words

NEW_METHOD = """
from dataclasses import dataclass
from moeify.methods.base import Method

@dataclass(frozen=True)
class Halve(Method):
    factor: float = 0.5

    def changed(self, weight, axis, seed, expert, which):
        return weight * self.factor
"""


def test_a_new_method_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halve.py").write_text(NEW_METHOD)
    monkeypatch.setattr(moeify.methods, "__path__", [*moeify.methods.__path__, str(tmp_path)])
    assert words("moeify.methods") == ("copy", "drop", "halve", "noise")
    config = MoEConfig(8, 2, method=moeify.methods.Halve(factor=0.25))
    assert MoEConfig.from_dict(config.to_dict()) == config and not config.exact
    assert config.method.changed(torch.ones(2, 2), 0, 0, "experts.0", "up0").eq(0.25).all()
