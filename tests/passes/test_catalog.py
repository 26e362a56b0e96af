from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from moeify.passes.catalog import describe


def test_every_pass_describes_itself() -> None:
    names = [pass_.name for pass_ in describe()]
    assert names == ["find_ffn", "insert_moe", "insert_losses", "lower"]
    for pass_ in describe():
        assert pass_.summary.endswith(".")
        assert pass_.before and pass_.after and pass_.refuses
        assert not any(line.startswith(" ") for line in pass_.after.splitlines())
    assert describe()[1].before.startswith("%up   = linear(%x, mlp.up.weight)")
    assert describe()[2].options == {"attach": "Carry the losses in backward instead of returning them."}
    assert describe()[2].notes.startswith("With `attach`")


def test_the_page_is_what_the_docstrings_say() -> None:
    root = Path(__file__).resolve().parents[2]
    written = subprocess.run(
        [sys.executable, root / "docs/write_passes.py", "--print"], capture_output=True, check=True
    )
    assert written.stdout.decode() == (root / "docs/passes.md").read_text(), "run `python docs/write_passes.py`"
