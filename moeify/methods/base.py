"""The base class of methods.

Shape legend, here and in the methods: H hidden size, I intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeify.config.contracts import MethodChoice


@dataclass(frozen=True)
class Method(MethodChoice):
    """Base class of methods: the fields of a subclass are its options, and `changed` is what it does."""
