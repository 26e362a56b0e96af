"""The code blocks of a page, run as a reader would type them: from top to bottom, in a folder with a tiny model."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

from moeify.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+) -->\n+)?"
    r'^```(?P<language>\w*)(?: title="(?P<file>[^"]+)")?\n(?P<text>.*?)^```$',
    flags=re.MULTILINE | re.DOTALL,
)

# Commands that no test runs, by the words that they begin with, and why. A block of which nothing can run here has its
# reason in the page, as a comment before it: <!-- not run: needs a GPU -->.
NOT_RUN = {
    "curl": "needs the server",
    "llama-cli": "needs llama.cpp: docs/engines.md says what was run",
    "make": "runs the tests, or what has its own",
    "moeify export my-moe OUT": "each takes seconds: tests/moeify/export runs them; here they are parsed",
    "pip install": "needs the network",
    "python convert_hf_to_gguf.py": "needs llama.cpp: docs/engines.md says what was run",
    "sbatch": "needs SLURM",
    "vllm serve": "needs vLLM: docs/vllm.md says what was run",
}
# A second run of a page's lines would find what the first one wrote.
ADDED = {"convert": ["--overwrite"], "export": ["--overwrite"], "report": ["--overwrite"]}
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


Exports = dict[tuple[str, ...] | None, Path]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and why it is not run, if the page says so."""

    page: str
    line: int
    language: str
    file: str | None
    text: str
    why: str | None


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in their order."""
    text, name = page.read_text(), page.relative_to(ROOT).as_posix()
    return [
        Block(
            name,
            text.count("\n", 0, found.start("text")),
            found["language"],
            found["file"],
            found["text"],
            found["why"],
        )
        for found in BLOCK.finditer(text)
    ]


def commands(block: Block) -> list[str]:
    """The commands of a block of shell."""
    lines = (line.strip() for line in block.text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def run_page(page: Path, patch: pytest.MonkeyPatch, exports: Exports) -> ModuleType:
    """Run a page in the current folder.

    Args:
        page: The page.
        patch: Undoes what was changed for it.
        exports: What was exported so far, by the options; it gets more.

    Returns:
        A module that holds the names of the page's Python.
    """
    module = ModuleType(f"page_{page.stem.replace('-', '_')}")
    patch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    for block in blocks(page):
        if block.why is None and block.file:
            write(block, patch)
        elif block.why is None and block.language == "python":
            code = compile("\n" * block.line + block.text, block.page, "exec")
            exec(code, vars(module))
        elif block.why is None and block.language == "sh":
            for line in commands(block):
                run_line(line, block, patch, exports)
    for name, value in list(vars(module).items()):
        if name.startswith("test_"):
            value()
    return module


def write(block: Block, patch: pytest.MonkeyPatch) -> None:
    """Write the file that a block is; where it would be one of the library's, its package then holds it, too."""
    assert block.file is not None
    file = Path(block.file)
    if (ROOT / file).exists():
        assert block.text == (ROOT / file).read_text(), f"{block.page} shows another {file} than there is"
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(block.text)
    if file.parts[0] == "moeify":
        package = importlib.import_module(".".join(file.parts[:-1]))
        patch.setattr(package, "__path__", [*package.__path__, str(file.parent.resolve())])


def run_line(line: str, block: Block, patch: pytest.MonkeyPatch, exports: Exports) -> None:
    """Run a command of moeify in this process, and a program that the page wrote as one rank."""
    command, _, file = line.partition(" > ")
    program, *arguments = shlex.split(command, comments=True)
    if any(line.startswith(words) for words in NOT_RUN):
        if program == "moeify":
            parsed = main.get_command(click.Context(main), arguments[0])
            assert parsed is not None and parsed.make_context(arguments[0], arguments[1:])
    elif program == "moeify":
        said = run_moeify(arguments, exports)
        if file:
            Path(file.split()[0]).write_text(said)
    elif program in {"python", "torchrun"} and arguments[-1].endswith(".py"):
        for name, value in ONE_RANK.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", [arguments[-1]])
        runpy.run_path(arguments[-1], run_name="__main__")
    else:
        pytest.fail(f"{block.page}: {line!r} is neither run nor in NOT_RUN, with a reason")


def run_moeify(arguments: list[str], exports: Exports) -> str:
    """Run a command; of exports with equal options the first alone, of which the others are copies."""
    name, *rest = arguments
    key = (Path(rest[1]).suffix, *rest[2:]) if name == "export" else None
    if key in exports:
        copy = shutil.copytree if exports[key].is_dir() else shutil.copy
        copy(exports[key], rest[1])
        return ""
    done = CliRunner().invoke(main, [*arguments, *ADDED.get(name, [])])
    assert done.exit_code == 0, f"moeify {shlex.join(arguments)}\n{done.output}"
    if key is not None:
        exports[key] = Path(rest[1]).resolve()
    return done.stdout
