"""Ways to make experts from a dense FFN: each file but base.py is one.

`moeify.methods.Drop(share=0.3)` goes into `MoEConfig(method=...)`; the name of the file, "drop", means the defaults.
"""

from __future__ import annotations

from typing import Any

from moeify.config.choice import find_by_class


def __getattr__(name: str) -> Any:
    return find_by_class(__name__, name)
