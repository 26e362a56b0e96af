"""Ranks that end or hang, named in the error of those that are left."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

import torch.distributed as dist

from moeify.errors import MoeifyError, told_as

_ANSWER = 0.5  # seconds: a rank that lives meets the same error at the same time


def told_by_ranks(
    what: str, group: dist.ProcessGroup | None = None, kind: type[MoeifyError] = MoeifyError
) -> AbstractContextManager[None]:
    """Turn an error of ranks that cannot talk to each other into one line that names those that are gone.

    Args:
        what: What this rank could not do.
        group: The ranks that talk; None for all.
        kind: What is raised; an error of moeify itself passes as it is.
    """

    def said() -> str:
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        return f"{what}: {_gone(ranks)}, and its own message says why"

    return told_as(said, kind)


def _gone(ranks: list[int]) -> str:
    silent = _silent(ranks)
    if len(silent) == 1:
        return f"rank {silent[0]} has ended or hangs"
    return f"one of the ranks {silent or ranks} has ended or hangs"


def _silent(ranks: list[int]) -> list[int]:
    """Return the ranks that do not say, where the ranks of the job first met, that they see the error too."""
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"moeify/{dist.get_rank()}/lives", "")
        until = time.monotonic() + _ANSWER
        while (silent := [rank for rank in ranks if not store.check([f"moeify/{rank}/lives"])]) and (
            time.monotonic() < until
        ):
            time.sleep(0.01)
    except Exception:  # the meeting place may have ended with the rank that held it
        return []
    return silent
