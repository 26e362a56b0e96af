"""The ranks that are gone, where the test of faults does not end them: all answer, none can be asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from moeify.errors import CheckpointError, ConfigError
from moeify.ranks import told_by_ranks


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A job of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_rank_that_answers_is_not_called_gone() -> None:
    words = r"^it stopped: one of the ranks \[0\] has ended or hangs, and its own message says why \(connection lost\)$"
    with pytest.raises(CheckpointError, match=words), told_by_ranks("it stopped", kind=CheckpointError):
        raise RuntimeError("connection lost\nat line 3")


@pytest.mark.usefixtures("alone")
def test_where_ranks_met_may_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended() -> None:
        raise dist.DistNetworkError("no store")

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", ended)
    with pytest.raises(CheckpointError, match=r"one of the ranks \[0\]"), told_by_ranks("x", kind=CheckpointError):
        raise RuntimeError("connection lost")


def test_our_own_errors_pass() -> None:
    with pytest.raises(ConfigError, match=r"^mine$"), told_by_ranks("it stopped"):
        raise ConfigError("mine")
