from __future__ import annotations

from typing import Any

import pytest
from moeify.export.requirements import oldest_runtime


@pytest.mark.parametrize(
    ("target", "quantize", "oldest"),
    [
        ("portable", None, (1, 23)), ("cpu", None, (1, 23)), ("cpu", "int8", (1, 24)), ("cpu", "int4", (1, 31)),
        ("cuda", None, (1, 28)), ("cuda", "int8", (1, 28)), ("cuda", "int4", (1, 31)),
    ],
)  # fmt: skip
def test_the_oldest_runtime_that_was_seen_to_compute_a_target_right(target: Any, quantize: Any, oldest: Any) -> None:
    assert oldest_runtime(target, quantize) == oldest
