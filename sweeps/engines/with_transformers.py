"""The transformers of another environment: version 4, as engines have it that stand on it."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sweeps.engines.program import TOKENS, Told, compared, main


def run(path: Path) -> Told:
    """Load a checkpoint; what its model lacks or has no place for is an error."""
    torch: Any = import_module("torch")
    auto: Any = import_module("transformers").AutoModelForCausalLM
    model, info = auto.from_pretrained(path, output_loading_info=True)
    left = {kind: sorted(map(str, found)) for kind, found in info.items() if found}
    if left:
        raise ValueError(f"the checkpoint does not fit {type(model).__name__}: {left}")
    with torch.no_grad():
        return Told(model.eval()(input_ids=torch.tensor([TOKENS])).logits[0].numpy())


if __name__ == "__main__":
    main(compared(run), version("transformers"))
