"""Routers: each file but base.py is one, with its options, its function, its module and its start values.

`moeify.routers.Sigmoid(bias_rate=1e-3)` goes into `MoEConfig(router=...)`; the name of the file, "sigmoid", means the
defaults.
"""

from __future__ import annotations

from typing import Any

from moeify.config.choice import find_by_class


def __getattr__(name: str) -> Any:
    return find_by_class(__name__, name)
