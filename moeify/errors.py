"""The errors that moeify raises on purpose: one line that says what is wrong and what to do.

Any other exception is a bug. The library never prints and never exits; `moeify.cli` turns these errors into exit codes.
"""

from __future__ import annotations


class MoeifyError(Exception):
    """A request that cannot be met; the message is one line that is complete in itself."""


class ConfigError(MoeifyError):
    """A setting that is wrong for every model (`top_k` above `experts`, an unknown method)."""


class CheckpointError(MoeifyError):
    """A checkpoint that cannot be read or written: not a model folder, truncated, unsafe, disk full."""


class RefusedError(MoeifyError):
    """A conversion that would not be right for this model."""


class VerificationError(MoeifyError):
    """A converted model that differs from the dense one by more than the tolerance."""


def first_line(error: Exception) -> str:
    """Return the first line of another library's message, for a message of one line."""
    return str(error).strip().split("\n")[0]
