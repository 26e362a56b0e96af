"""Every example runs to its end: the training programs for a few steps (`--quick`), which writes no file."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.moeify import tiny
from tests.moeify.command import moeify_command
from tests.moeify.parallel import harness

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TRAINING = sorted(path.parent.name for path in EXAMPLES.glob("*/run.py"))
RECIPES = sorted(path.stem for path in EXAMPLES.glob("recipes/*.py") if path.stem != "common")
if not harness.HAS_EXPERT_PARALLEL:
    RECIPES.remove("sft_ranks")
NOT_RUN = {
    "onnx/cuda_graph.py": "needs a GPU and onnxruntime-gpu",
    "recipes/common.py": "no program: what the recipes share",
    "records.py": "no program: how the training examples keep what they measured",
    "smollm2/pictures.py": "no program: the tables and pictures of smollm2/run.py",
    "small_lm.py": "no program: what the training examples share",
}


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    importlib.import_module(f"examples.{name}").main()


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in EXAMPLES.rglob("*") if path.suffix in {".md", ".png", ".json"}}


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_example_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files()
    if name == "ranks":  # it forks, and a test before this one may have started threads of autograd
        said = subprocess.run(
            [sys.executable, "-m", "examples.ranks.run", "--quick"],
            cwd=EXAMPLES.parent, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    else:
        run(f"{name}.run", monkeypatch, "--quick")
        said = capsys.readouterr().out
    table = [line for line in said.splitlines() if line.startswith("|")]
    written = (EXAMPLES / name / "README.md").read_text().splitlines()
    assert table[0] in written, "the table in the README has other columns than the program's"
    assert len(table) == 2 + rows_of_one_seed(written)
    assert not re.search(r"\bnan\b|\binf\b", "\n".join(table))
    assert files() == before


@pytest.mark.filterwarnings("ignore")  # of other libraries about each other
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name: str, tmp_path: Path) -> None:
    """The converted model has the dense one's loss; what is saved, and what is resumed, is what was trained."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        f"examples.recipes.{name}",
        "--fast",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = {words: float(number) for words, number in re.findall(r"([a-z][a-z ]*):? (\d+\.\d+)", done.stdout)}
    same = {"loop": ("loss: dense", "converted"), "fsdp2": ("two steps more", "resumed in a new model")}
    if name in same:
        first, second = (said[words.removeprefix("loss: ")] for words in same[name])
        assert first == pytest.approx(second, abs=2e-4)
    if "loaded again" in said:
        assert said["loaded again"] == pytest.approx(said.get("trained", said.get("tuned")), abs=2e-4)


def rows_of_one_seed(lines: list[str]) -> int:
    start, end = lines.index("<!-- seed 0 -->"), lines.index("<!-- end of seed 0 -->")
    return sum(line.startswith("|") for line in lines[start:end]) - 2


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MoE in ONNX, with a tokenizer of one word for each id."""
    folder = tmp_path_factory.mktemp("exported")
    tiny.save(tiny.build("llama"), folder / "dense")
    tiny.tokenizer().save_pretrained(folder / "dense")
    out = folder / "moe.onnx"
    done = moeify_command("export", folder / "dense", out, "--preset", "mixtral", "--experts", 3, "--layers", "0")
    assert done.exit_code == 0, done.output
    return out


def test_an_exported_model_generates_without_moeify(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("onnx.generate", monkeypatch, str(exported), "w5 w17 w3")
    shown = capsys.readouterr()
    assert re.fullmatch(r"(w\d+){1,64}", shown.out)
    assert "CPUExecutionProvider" in shown.err


def test_every_program_is_run_or_its_reason_is_given() -> None:
    programs = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")}
    run_here = {f"{name}/run.py" for name in TRAINING} | {f"recipes/{name}.py" for name in (*RECIPES, "sft_ranks")}
    assert programs == run_here | {"onnx/generate.py"} | set(NOT_RUN)


def test_the_overview_names_every_example() -> None:
    named = set(re.findall(r"^\| \[(\w+)\]", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE))
    assert named == {path.name for path in EXAMPLES.iterdir() if path.is_dir() and not path.name.startswith("__")}
