"""What the export needs beside moeify itself: the `onnx` extra."""

from __future__ import annotations

from importlib import import_module, metadata

from moeify.errors import MoeifyError

MINIMUM = (1, 23)  # the oldest ONNX Runtime that the targets are tested with


def check_installed() -> None:
    """Raise unless what the export imports is there.

    Raises:
        MoeifyError: a package is missing, or ONNX Runtime is too old.
    """
    for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError as error:
            raise MoeifyError(f"ONNX export needs {name}: pip install 'moeify[onnx]'") from error
    check_runtime(MINIMUM)


def runtime_version() -> str:
    """Return the version of the ONNX Runtime that is installed, whichever package brought it."""
    version: str = import_module("onnxruntime").__version__
    return version


def check_runtime(minimum: tuple[int, ...]) -> None:
    """Raise if the installed ONNX Runtime is older than `minimum`.

    Raises:
        MoeifyError: it is.
    """
    installed = tuple(int(part) for part in runtime_version().split(".")[:2])
    if installed < minimum:
        need = ".".join(map(str, minimum))
        raise MoeifyError(
            f"onnxruntime {runtime_version()} is too old: {need} or newer is needed; pip install -U onnxruntime"
        )


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that made a file."""
    names = ("torch", "transformers", "onnx", "onnxscript")
    return {name: metadata.version(name) for name in names}
