"""llama.cpp: its own converter makes a GGUF file of the checkpoint, and the library runs that.

LLAMA_CPP names the folder where `make engines` built it.
"""

from __future__ import annotations

import io
import json
import logging
import os
import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from sweeps.engines.program import TOKENS, Told, compared, main

# Types whose converter asserts that there is a head that predicts several tokens, if it is not told otherwise.
NO_SUCH_HEAD = ("qwen3_5_moe_text",)
BUILT = Path(os.environ.get("LLAMA_CPP", ""))


def convert(path: Path, file: Path) -> None:
    """Run the converter, in this process: what it imports takes longer than the conversion.

    Raises:
        ValueError: It refuses the checkpoint; what it says.
    """
    script, said = BUILT / "src/convert_hf_to_gguf.py", io.StringIO()
    command = [str(script), str(path), "--outtype", "f32", "--outfile", str(file)]
    if json.loads((path / "config.json").read_text())["model_type"] in NO_SUCH_HEAD:
        command.append("--no-mtp")
    handler = logging.StreamHandler(said)
    logging.getLogger("hf-to-gguf").addHandler(handler)
    try:
        with patch.object(sys, "argv", command), patch.object(sys, "path", [str(script.parent), *sys.path]):
            runpy.run_path(str(script), run_name="__main__")
    except (Exception, SystemExit) as error:
        words = str(error) if isinstance(error, Exception) else said.getvalue().strip().splitlines()[-1]
        raise ValueError(f"{script.name}: {type(error).__name__}: {words}") from error
    finally:
        logging.getLogger("hf-to-gguf").removeHandler(handler)


def run(path: Path) -> Told:
    """Convert a checkpoint, and run it with a float32 cache and without flash attention."""
    file = path.parent / "model.gguf"
    try:
        convert(path, file)
        sys.path.append(str(BUILT))  # the binding, of the same source distribution
        llama: Any = import_module("llama_cpp").Llama
        size = 2 * len(TOKENS)
        model = llama(str(file), n_ctx=size, n_batch=size, n_ubatch=size, logits_all=True, type_k=0, type_v=0,
                      n_threads=1, n_threads_batch=1, verbose=bool(os.environ.get("LOUD")))  # fmt: skip
        model.eval(TOKENS)
        values = np.array(model.scores[: len(TOKENS)])
        model.close()
    finally:
        file.unlink(missing_ok=True)
    return Told(values)


if __name__ == "__main__":
    main(compared(run), (BUILT / "VERSION").read_text().strip())
