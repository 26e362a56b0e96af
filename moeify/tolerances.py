"""One table of tolerances by dtype, used by every check in the library and every test.

A relative difference is `max|a - b| / max|b|`: the same yardstick that `moeify verify` applies to logits.
Keys are torch dtype names, so that reading the table does not import torch.
"""

from __future__ import annotations

TOLERANCE: dict[str, float] = {
    "float64": 1e-12,
    "float32": 1e-5,
    "bfloat16": 2e-2,
    "float16": 3e-3,
}
