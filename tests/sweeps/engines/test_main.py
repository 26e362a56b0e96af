"""An engine that ends its process costs the checkpoint that it had, and no other."""

from __future__ import annotations

from pathlib import Path

from sweeps.engines.__main__ import Engine, run

# The engine: it says something of every folder up to the one that kills it.
PROGRAM = """#!/bin/sh
shift 2
for folder in "$@"; do
    case $folder in
        *bad) echo "GGML_ASSERT in $HOME_OF" >&2; exit 3;;
    esac
    echo "noise of the engine"
    echo "{\\"version\\": \\"1\\", \\"folder\\": \\"$folder\\", \\"difference\\": 0.5}"
done
"""


def test_the_next_checkpoints_are_run_after_a_crash(tmp_path: Path) -> None:
    python = tmp_path / "old/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PROGRAM)
    python.chmod(0o755)
    engine = Engine("with_x", "old", {"HOME_OF": "{}/y"})
    folders = [tmp_path / name for name in ("a", "bad", "b", "very bad")]
    found = run(engine, tmp_path, folders)
    assert [found[str(folder)].get("difference") for folder in folders] == [0.5, None, 0.5, None]
    assert found[str(folders[1])]["error"] == f"the process ended with 3: GGML_ASSERT in {tmp_path}/y"
