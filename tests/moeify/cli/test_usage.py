"""Wrong usage is answered at once: nothing that takes seconds to import is loaded for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moeify.cli import COMMANDS
from moeify.families.table import FAMILIES
from tests.moeify.command import moeify_command

BASE = ["--experts", "8", "--top-k", "2"]
WRONG: dict[str, tuple[list[str], int, str]] = {
    "no destination": (["src", *BASE], 2, "DST is missing"),
    "no experts": (["src", "dst"], 2, "--experts and --top-k are needed"),
    "no top-k": (["src", "dst", "--experts", "8"], 2, "--experts and --top-k are needed"),
    "more choices than experts": (["src", "dst", "--experts", "2", "--top-k", "3"], 2, "there are only 2 experts"),
    "a million experts": (["src", "dst", "--experts", "1000000", "--top-k", "2"], 2, "at most 8192"),
    "a router": (["src", "dst", *BASE, "--router", "sofmax"], 2, "router is 'sofmax': expected one of"),
    "a method": (["src", "dst", *BASE, "--method", "cpy"], 2, "method is 'cpy': expected one of"),
    "a format": (["src", "dst", *BASE, "--to", "mixtrl"], 2, "--to mixtrl: expected auto, moeify, "),
    "a pattern": (["src", "dst", *BASE, "--layers", "foo["], 2, "not a regular expression"),
    "a count": (["src", "dst", *BASE, "--layers", "last:x"], 2, "expected a positive number"),
    "a dtype": (["src", "dst", *BASE, "--dtype", "fp8"], 2, "'bf16'"),
    "a part": (["src", "dst", *BASE, "--part", "5/4"], 2, "write 1/4, 2/4, 3/4 and 4/4"),
    "a size": (["src", "dst", *BASE, "--shard-size", "10GoB"], 2, "10GiB"),
    "an output that exists": (["src", ".", *BASE], 1, "exists: choose another output folder"),
    "--json alone": (["src", "dst", *BASE, "--json"], 2, "--json goes with --dry-run"),
    "--yaml alone": (["src", "dst", *BASE, "--yaml"], 2, "--yaml goes with --dry-run"),
    "a type of GGUF in a folder": (["src", "dst", *BASE, "--dtype", "q8_0"], 2, "goes with a DST that ends in .gguf"),
    "moeify format as GGUF": (["src", "x.gguf", *BASE, "--to", "moeify"], 2, "--to moeify goes with a folder"),
    "going on with GGUF": (["src", "x.gguf", *BASE, "--resume"], 2, "--part and --join go with a folder"),
    "no recipe": (["--config", "nothing.yaml"], 1, "nothing.yaml cannot be read"),
}
PROGRAM = """
import sys
from click.testing import CliRunner
from moeify.cli import main
for name, (arguments, code, words) in {wrong!r}.items():
    done = CliRunner().invoke(main, ["convert", *arguments])
    line = " ".join(done.stderr.split())
    assert done.exit_code == code and words in line, (name, done.exit_code, line)
    heavy = {{"torch", "transformers", "triton", "numpy", "huggingface_hub", "rich"}} & set(sys.modules)
    assert not heavy, (name, heavy)
"""


def test_wrong_usage_loads_nothing_heavy(tmp_path: Path) -> None:
    program = PROGRAM.format(wrong=WRONG)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "hint"), [("convrt", "did you mean convert?"), ("xyz", f"there are {', '.join(COMMANDS)}")]
)
def test_a_command_that_is_not_there(name: str, hint: str) -> None:
    done = moeify_command(name, "--experts", "8")
    assert done.exit_code == 2 and f"there is no command '{name}': {hint}" in done.stderr
    assert "no such option" in moeify_command("--nothing").stderr.lower()


def test_shells_complete_commands_and_options(tmp_path: Path) -> None:
    program = "from moeify.cli import main; main(prog_name='moeify')"
    for typed, wanted in (("moeify con", "plain,convert\n"), ("moeify convert --gran", "plain,--granularity\n")):
        words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_MOEIFY_COMPLETE": "bash_complete"}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | words, capture_output=True, text=True, check=True)
        assert done.stdout == wanted


def test_help_lists_every_choice() -> None:
    shown = " ".join(moeify_command("convert", "--help").output.split())
    for word in (*FAMILIES, "expert_choice", "noise", "every:N", "bf16", "capacity_factor", "drop_order", "z_loss"):
        assert word in shown


@pytest.mark.parametrize(
    ("text", "nbytes"), [("10GiB", 10 * 2**30), ("1.5kib", 1536), ("2TB", 2 * 10**12), ("7", 7), ("3 MB", 3_000_000)]
)
def test_sizes(text: str, nbytes: int) -> None:
    from moeify.cli.options import Size

    assert Size().convert(text, None, None) == nbytes


@pytest.mark.parametrize(("text", "name"), [("bf16", "bfloat16"), ("fp32", "float32"), ("float16", "float16")])
def test_dtypes(text: str, name: str) -> None:
    from moeify.cli.options import Dtype

    dtype: Any = Dtype(("float32", "bfloat16", "float16"))
    assert dtype.convert(text, None, None) == name
