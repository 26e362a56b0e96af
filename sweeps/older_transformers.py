"""Load checkpoints with the transformers that runs this, and compare logits with those that lie beside them.

    OTHER_PYTHON sweeps/older_transformers.py FOLDER     for each folder in FOLDER; one JSON document

It imports nothing of the project, so that an environment with transformers 4 can run it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file


def measure(folder: Path) -> float | str:
    """Return the largest difference of a logit, relative to the largest logit, or why there is none."""
    stored = load_file(folder / "expected.safetensors")
    auto: Any = transformers.AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(folder / "dst", output_loading_info=True)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200]
    left = {kind: sorted(map(str, found)) for kind, found in info.items() if found}
    if left:
        return f"does not fit: {left}"[:300]
    with torch.no_grad():
        found = model.eval()(input_ids=stored["tokens"]).logits
    return float((found - stored["logits"]).abs().max() / stored["logits"].abs().max())


def main() -> None:
    """Measure every folder."""
    results = {folder.name: measure(folder) for folder in sorted(Path(sys.argv[1]).iterdir())}
    print(json.dumps({"transformers": transformers.__version__, "found": results}))


if __name__ == "__main__":
    main()
