"""mlx-lm, on the CPU."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sweeps.engines.program import TOKENS, Told, compared, main


def run(path: Path) -> Told:
    """Load a checkpoint as `mlx_lm.load` does."""
    core: Any = import_module("mlx.core")
    utils: Any = import_module("mlx_lm.utils")
    core.set_default_device(core.cpu)
    model, _ = utils.load_model(path)
    return Told(np.array(model(core.array([TOKENS]))[0].astype(core.float32)))


if __name__ == "__main__":
    main(compared(run), f"{version('mlx-lm')}, mlx {version('mlx')}")
