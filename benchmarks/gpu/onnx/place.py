"""Where onnxruntime-gpu places the nodes of exported files, on a machine without a GPU: CUDA is replaced by stubs.

    python -m benchmarks.gpu.onnx.place --venv FOLDER [--write] [MODEL.onnx …]

Installs the wheel into FOLDER the first time (it cannot live beside onnxruntime). Without files, exports every small
model of the pool. For each file: does a session start and run, which provider gets the MoE and QMoE nodes, what is
copied between CPU and GPU, what is on the CPU beside sizes, and is it captured as a CUDA graph? All of a file for CUDA
must be there, without a copy, and the rules of `benchmarks.gpu.onnx.rules` must say the same. Results are garbage.
Last, the operators without a kernel for bfloat16 must be those of `moeify.export.lower.precision`. Exit code 1 if
something is not so; --write writes record and page beside this file. Needs g++ and nm.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch

import moeify
from benchmarks.gpu.onnx.models import build
from benchmarks.gpu.onnx.plan import JOBS
from benchmarks.gpu.onnx.rules import copies
from benchmarks.record import Record, keep, measured
from moeify.export.lower.precision import WITHOUT_BFLOAT16

VERSION = "1.31.1"
WHAT = "`make gpuwheel`, without a GPU: CUDA's libraries are stubs, so nothing is computed and nothing is timed"
CODE = ("moeify/export/lower", "moeify/export/targets.py")
HEAD = (
    "| file | nodes | experts on CUDA | copies | on the CPU beside sizes | captured | |",
    "|---|--:|---|--:|---|---|---|",
)
STUBS = Path(__file__).with_name("stub")
CUDNN = (
    *("Create", "SetStream", "Destroy", "CreateTensorDescriptor", "SetTensor4dDescriptor", "SetTensorNdDescriptor"),
    *("DestroyTensorDescriptor", "CreateReduceTensorDescriptor", "SetReduceTensorDescriptor", "ReduceTensor"),
    *("GetReductionWorkspaceSize", "GetReductionIndicesSize", "DestroyReduceTensorDescriptor", "SoftmaxForward"),
    "AddTensor",
)
# What a library must define beside what the provider's library asks for by version.
LIBRARIES: dict[str, list[str]] = {
    "libcudart.so.13": [],
    "libcublas.so.13": [],
    "libcublasLt.so.13": [],
    "libcudnn.so.9": [f"cudnn{name}" for name in CUDNN],
    "libcuda.so.1": ["cuTensorMapEncodeTiled", "cuInit"],
    "libcurand.so.10": [],
}


def build_stubs(provider: Path, folder: Path) -> None:
    """Compile stubs for the functions that a provider's library asks for."""
    symbols = subprocess.check_output(["nm", "-D", "--undefined-only", provider], text=True).splitlines()
    wanted = {library: list(names) for library, names in LIBRARIES.items()}
    for symbol in symbols:
        name, _, version = symbol.split()[-1].partition("@")
        if version in wanted:
            wanted[version].append(name)
    for library, names in wanted.items():
        runtime = "cudart" in library
        source = (STUBS / ("cudart.cpp" if runtime else "others.cpp")).read_text()
        for name in names:
            if f" {name}(" not in source and f"*{name}(" not in source:
                source += _stub(name, creates="Create" in name and not runtime)
        (folder / "stub.cpp").write_text(source)
        (folder / "stub.map").write_text(f"{library} {{ global: *; }};\n")
        versions = f"-Wl,--version-script={folder / 'stub.map'}"
        command: list[str | Path] = ["g++", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library}", versions]
        subprocess.check_call([*command, "-o", folder / library, folder / "stub.cpp"])


def _stub(name: str, creates: bool) -> str:
    if creates:
        return f"X int {name}(void** p) {{ *p = handle(); return 0; }}\n"
    return f"X int {name}() {{ return 0; }}\n"


@dataclass(frozen=True)
class Placement:
    """What became of a file.

    Attributes:
        name: Of the file.
        target: What it was made for.
        plain: What `run_one.py` says of a session, and of one that captures.
        graph: The same of a session that captures.
        predicted: What the rules say is copied.
    """

    name: str
    target: str
    plain: dict[str, Any]
    graph: dict[str, Any]
    predicted: list[str]

    @property
    def ok(self) -> bool:
        """Whether a file for CUDA is there as a whole, and the rules agree."""
        if self.target != "cuda":
            return True
        if self.plain["failed"] or self.graph["failed"]:
            return False
        there = all(expert.endswith("@CUDA") for expert in self.plain["experts"])
        return there and self.plain["copies"] == 0 and not self.plain["values_on_cpu"] and not self.predicted

    def row(self) -> str:
        """Return a row of the table."""
        experts = self.plain.get("experts", ())
        there = f"{sum(e.endswith('@CUDA') for e in experts)} of {len(experts)}" if experts else "-"
        captured = "yes" if self.graph["failed"] is None else "no"
        beside = ", ".join(sorted(set(self.plain.get("values_on_cpu", ())))) or "-"
        cells = (self.name, self.plain.get("nodes", "-"), there, self.plain.get("copies", "-"), beside, captured,
                 "ok" if self.ok else self.plain["failed"] or self.graph["failed"] or "WRONG")  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"


def place(path: Path, environment: dict[str, str], python: Path) -> Placement:
    """Run a file twice, each in a process of its own, which a kernel without results may end."""
    plain, graph = (_said(python, environment, "run_one.py", str(path), form) for form in ("plain", "graph"))
    model = onnx.load(path, load_external_data=False)
    made = {entry.key: entry.value for entry in model.metadata_props}
    return Placement(path.stem, made.get("moeify.target", ""), plain, graph, copies(model.graph))


def _said(python: Path, environment: dict[str, str], script: str, *arguments: str) -> Any:
    """Return what a script printed as JSON, or its last words."""
    command = [str(python), str(STUBS / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()] or [f"{done.returncode}"]
    return json.loads(lines[-1]) if done.returncode == 0 else {"failed": lines[-1][-160:]}


def export_all(folder: Path) -> list[Path]:
    """Export a small model for each job of the pool."""
    paths = [folder / f"{name}.onnx" for name in JOBS]
    for path, job in zip(paths, JOBS.values(), strict=True):
        model = build(job.model, small=True).to(getattr(torch, job.dtype))
        moeify.export_onnx(model, path, job.target, job.quantize)
    return paths


def install(venv: Path) -> Path:
    """Return the Python of an environment with the wheel, which is made if it is not there."""
    python = venv.absolute() / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        packages = (f"onnxruntime-gpu=={VERSION}", "numpy", "onnx")
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def main() -> int:
    """Build the stubs and place every file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("models", type=Path, nargs="*")
    arguments = parser.parse_args()
    python = install(arguments.venv)
    with TemporaryDirectory() as scratch:
        build_stubs(next(arguments.venv.rglob("libonnxruntime_providers_cuda.so")), Path(scratch))
        environment = {**os.environ, "LD_LIBRARY_PATH": scratch}
        print(*HEAD, sep="\n", flush=True)
        rows, good = [], True
        for path in arguments.models or export_all(Path(scratch)):
            placed = place(path, environment, python)
            rows.append(placed.row())
            print(rows[-1], flush=True)
            good = good and placed.ok
        lacking = set(_said(python, environment, "kernels.py"))
    same = lacking == WITHOUT_BFLOAT16
    last = f"Operators without a kernel for bfloat16: {len(lacking)}, " + (
        "as the export has them." if same else "NOT as"
    )
    if not same:
        last += f" the export has them: {sorted(lacking ^ WITHOUT_BFLOAT16)}."
    print(last, flush=True)
    if arguments.write:
        runs = {"rows": rows, "said": last}
        versions = {"onnxruntime-gpu": VERSION}
        found = measured(WHAT, "nothing else", CODE, summary(runs), runs, versions=versions)
        keep(__file__, found, page)
    return 0 if good and same else 1


def summary(runs: Mapping[str, Any]) -> dict[str, int]:
    """Return how many files there are, and how many are placed as they should be."""
    return {"files": len(runs["rows"]), "right": sum(row.endswith("| ok |") for row in runs["rows"])}


def page(record: Record) -> str:
    """Return the page of a record."""
    lines = [
        f"# Where onnxruntime-gpu {record.versions['onnxruntime-gpu']} places exported files\n",
        f"{record.what}.",
        f"{record.line()}\n",
        *HEAD,
        *record.runs["rows"],
        f"\n{record.runs['said']}\n",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
