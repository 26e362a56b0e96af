"""What a user decides about a conversion: the settings, and what they ask of a router and of a method."""

from __future__ import annotations

from moeify.config.settings import MoEConfig

__all__ = ["MoEConfig"]
