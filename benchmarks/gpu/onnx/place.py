"""Where onnxruntime-gpu places the nodes of exported files, on a machine without a GPU: CUDA is replaced by stubs.

    python -m benchmarks.gpu.onnx.place SITE MODEL.onnx …

SITE holds the folder `onnxruntime` of the wheel, cut or whole. Prints for each file which provider gets the MoE and
QMoE nodes, how many copies there are between CPU and GPU, and whether a session can capture it. Results are garbage.
Needs g++ and nm.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

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


def build(provider: Path, folder: Path) -> None:
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


def main() -> None:
    """Build the stubs, then run each file in a process of its own, which a kernel without results may end."""
    site = Path(sys.argv[1]).resolve()
    with TemporaryDirectory() as folder:
        build(site / "onnxruntime/capi/libonnxruntime_providers_cuda.so", Path(folder))
        environment = {**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": str(site)}
        for path in sys.argv[2:]:
            for form in ("plain", "graph"):
                command: list[str | Path] = [sys.executable, STUBS / "run_one.py", path, form]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                lines = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()]
                said = lines[-1] if lines else f"ended with {done.returncode}"
                print(f"{Path(path).name} {form}: {said}", flush=True)


if __name__ == "__main__":
    main()
