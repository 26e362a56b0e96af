"""llama.cpp's converter runs in the process of its program, and what it says of a checkpoint is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sweeps.engines import with_llama_cpp

SCRIPT = """
import json, logging, sys
from pathlib import Path
from beside import WORD
kind = json.loads(Path(sys.argv[1], "config.json").read_text())["model_type"]
if kind == "strange":
    logging.getLogger("hf-to-gguf").error("Model StrangeForCausalLM is not supported")
    sys.exit(1)
Path(sys.argv[-1 if kind == "plain" else -2]).write_text({"plain": WORD, "qwen3_5_moe_text": sys.argv[-1]}[kind])
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint's folder, beside a converter that imports from its own folder."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src/convert_hf_to_gguf.py").write_text(SCRIPT)
    (tmp_path / "src/beside.py").write_text("WORD = 'made'")
    monkeypatch.setattr(with_llama_cpp, "BUILT", tmp_path)
    return tmp_path


def test_a_converter_runs_again_and_again_and_says_why_it_refuses(place: Path) -> None:
    for kind, made in (("plain", "made"), ("qwen3_5_moe_text", "--no-mtp"), ("plain", "made")):
        (place / "config.json").write_text(json.dumps({"model_type": kind}))
        with_llama_cpp.convert(place, place / "out")
        assert (place / "out").read_text() == made
    for kind, said in (("strange", "SystemExit: Model StrangeForCausalLM is not supported"), ("x", "KeyError: 'x'")):
        (place / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ValueError, match=f"^convert_hf_to_gguf.py: {said}$"):
            with_llama_cpp.convert(place, place / "out")
