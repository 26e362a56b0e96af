"""moeify: turn a dense PyTorch transformer into a sparse Mixture-of-Experts, with a proof.

Importing this package loads neither torch nor transformers: each public name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "MoeifyError": "moeify.errors",
}

__all__ = ["MoeifyError"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moeify' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
