"""What is shipped, under which names it is imported, and what importing it costs."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("moeify", "passes", "kernels")
HEAVY = {"torch", "transformers", "triton", "numpy"}
HEAVY_FOR_HELP = HEAVY | {"rich", "yaml", "jinja2", "huggingface_hub", "safetensors"}  # it answers in 0.1 s of CPU time
RUNTIME = (
    "import importlib, pkgutil, moeify.runtime as package\n"
    "[importlib.import_module(f'moeify.runtime.{file.name}') for file in pkgutil.iter_modules(package.__path__)]"
)


def loaded_by(*arguments: str, cwd: Path) -> set[str]:
    """The top-level packages that a run of Python imports."""
    report = run(sys.executable, "-X", "importtime", *arguments, cwd=cwd).stderr
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in report.splitlines()}


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three distributions of a clean copy: an sdist, `from_sdist/*.whl` and `from_tree/*.whl`."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", tree, "--outdir")
    run(*build, out / "from_sdist", cwd=out)
    run(*build, out / "from_tree", "--wheel", cwd=out)
    return out


def wheel_names(folder: Path) -> set[str]:
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def library_files() -> set[str]:
    """Every file of the three folders, by the path it is imported under."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                inside = path.relative_to(ROOT).as_posix()
                found.add(inside if folder == "moeify" else f"moeify/{inside}")
    return found


def test_the_wheel_holds_the_library_and_nothing_else(dist: Path) -> None:
    """That leaves out tests, examples, benchmarks and sweeps."""
    shipped = {name for name in wheel_names(dist / "from_tree") if ".dist-info/" not in name}
    assert shipped == library_files()
    assert "moeify/py.typed" in shipped
    assert {name.partition("/")[0] for name in shipped} == {"moeify"}


@pytest.mark.parametrize("folder", ["passes", "passes/matching", "kernels", "kernels/gpu", "kernels/tools"])
def test_the_wheel_holds_what_lies_behind_the_links(dist: Path, folder: str) -> None:
    files = {name for name in wheel_names(dist / "from_tree") if name.rpartition("/")[0] == f"moeify/{folder}"}
    assert files, f"moeify/{folder} is not shipped: is moeify/{folder.partition('/')[0]} still a link?"


def test_the_sdist_gives_the_same_wheel(dist: Path) -> None:
    assert wheel_names(dist / "from_sdist") == wheel_names(dist / "from_tree")


def test_the_sdist_holds_the_library(dist: Path) -> None:
    (sdist,) = (dist / "from_sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert library_files() | {"pyproject.toml", "LICENSE", "README.md"} <= names


def test_the_folders_at_the_root_are_not_importable_by_their_bare_names(tmp_path: Path) -> None:
    program = "from importlib.util import find_spec; print([n for n in ('kernels', 'passes') if find_spec(n)])"
    assert run(sys.executable, "-c", program, cwd=tmp_path).stdout.strip() == "[]"


def test_kernels_has_no_init() -> None:
    """With one, `import kernels` at the root of the repository runs our code, and transformers asks for that name."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_transformers_at_the_root_of_the_repository_runs_none_of_our_kernels() -> None:
    program = (
        "import sys, transformers.integrations.hub_kernels\n"
        "files = [getattr(module, '__file__', None) or '' for module in list(sys.modules.values())]\n"
        "print([file for file in files if file.startswith(sys.argv[1])])"
    )
    assert run(sys.executable, "-c", program, ROOT / "kernels", cwd=ROOT).stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [("-c", "import moeify"), ("-m", "moeify", "--help")], ids=" ".join)
def test_import_and_help_load_nothing_heavy(arguments: tuple[str, ...], tmp_path: Path) -> None:
    loaded = loaded_by(*arguments, cwd=tmp_path)
    assert "moeify" in loaded and not loaded & HEAVY_FOR_HELP


def test_an_installed_wheel_works_without_the_checkout(dist: Path, tmp_path: Path) -> None:
    """In an environment that has moeify from the wheel alone, and what it needs from this one."""
    (wheel,) = (dist / "from_tree").glob("*.whl")
    place, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    venv.create(place, symlinks=True)
    program = (place / "bin/python", "-I")
    (site,) = place.glob("lib/*/site-packages")
    (site / "needed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = (sys.executable, "-m", "pip", "--python", place, "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--ignore-installed", wheel, cwd=empty)
    assert "Usage: moeify" in run(*program, place / "bin/moeify", "--help", cwd=empty).stdout
    modules = "moeify.passes.find_ffn, moeify.kernels.ops, moeify.report.render"
    held = "[m.__file__ for n, m in sys.modules.items() if n.startswith('moeify.') and m.__file__]"
    files = ast.literal_eval(run(*program, "-c", f"import sys, {modules}; print({held})", cwd=empty).stdout)
    assert len(files) > 20 and all(Path(file).is_relative_to(site) for file in files)


def test_the_runtime_of_exported_models_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    loaded = loaded_by("-c", RUNTIME, cwd=tmp_path)
    assert "moeify" in loaded and not loaded & {"torch", "transformers"}


def test_the_oldest_python_is_one_number() -> None:
    """pyproject.toml has it; ruff and the Makefile read it there, and the texts say the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = project["project"]["requires-python"].removeprefix(">=")
    assert re.fullmatch(r"3\.\d+", oldest)
    assert "target-version" not in project["tool"]["ruff"], "ruff reads requires-python"
    assert "python_version" not in project["tool"]["mypy"]
    assert "'s/^requires-python = " in (ROOT / "Makefile").read_text()
    for text in ("README.md", "CONTRIBUTING.md", "constraints.txt"):
        named = set(re.findall(r"Python (3\.\d+)", (ROOT / text).read_text()))
        assert named == {oldest}, text


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-oldest.txt"])
def test_every_version_of_the_tools_is_pinned(constraints: str) -> None:
    """What `pip install -e '.[dev]'` asks for has its line in each file of constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["examples"]]
    names = {re.split(r"[^\w.-]", need)[0].lower() for need in wanted}
    pinned = re.findall(r"^([\w.-]+)[=>]=", (ROOT / constraints).read_text(), flags=re.MULTILINE)
    assert sorted(names - {name.lower() for name in pinned}) == []


def test_the_oldest_versions_that_are_allowed_are_those_that_are_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needs = [need.partition(";")[0] for need in (*project["dependencies"], *extras["gguf"], *extras["onnx"])]
    tested = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints-oldest.txt").read_text(), flags=re.MULTILINE))
    allowed = dict(need.split(">=") for need in needs)
    assert {name: tested[name][: len(oldest)] for name, oldest in allowed.items()} == allowed
