"""The errors that moeify raises on purpose: one line that says what is wrong and what to do.

Anything else that escapes is a bug. The library never prints and never exits; `moeify.cli` turns these into exit codes.
"""

from __future__ import annotations


class MoeifyError(Exception):
    """What the caller asked for cannot be done; the message is one line, complete in itself."""


class ConfigError(MoeifyError):
    """A setting is wrong in itself, whatever the model (`top_k` above `experts`, an unknown method)."""


class CheckpointError(MoeifyError):
    """A checkpoint cannot be read or written: not a model folder, truncated, unsafe, disk full."""


class RefusedError(MoeifyError):
    """The conversion is possible to ask for but would not be right for this model."""


class VerificationError(MoeifyError):
    """A converted model was measured against the dense one and differs by more than the tolerance."""
