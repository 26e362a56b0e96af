"""moeify: turn a dense PyTorch transformer into a sparse Mixture-of-Experts, with a proof.

Importing this package loads neither torch nor transformers: each public name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeify.config import MoEConfig
    from moeify.export import OnnxReport, export_onnx
    from moeify.inplace import convert
    from moeify.errors import MoeifyError
    from moeify.loading import load
    from moeify.plan import Plan
    from moeify.planning import find_ffns
    from moeify.registration import register
    from moeify.verification import VerifyReport, verify

__version__ = "0.1.0"

# No module may have the name of a public function: importing it would put the module in the function's place.
_HOME = {
    "MoEConfig": "config",
    "MoeifyError": "errors",
    "OnnxReport": "export",
    "Plan": "plan",
    "VerifyReport": "verification",
    "convert": "inplace",
    "export_onnx": "export",
    "find_ffns": "planning",
    "load": "loading",
    "register": "registration",
    "verify": "verification",
}

__all__ = [
    "MoEConfig",
    "MoeifyError",
    "OnnxReport",
    "Plan",
    "VerifyReport",
    "convert",
    "export_onnx",
    "find_ffns",
    "load",
    "register",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moeify' has no attribute {name!r}")
    return getattr(import_module(f"moeify.{_HOME[name]}"), name)
