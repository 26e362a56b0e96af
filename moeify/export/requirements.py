"""What the export needs beside moeify itself: the `onnx` extra."""

from __future__ import annotations

from importlib import import_module, metadata

from moeify.errors import MoeifyError
from moeify.export.report import Quantization, Target

_TESTED = (1, 23)  # the oldest ONNX Runtime that the tests were run with
_CUDA = (1, 28)  # before, the CUDA kernel of MoE ignored the attributes of SwiGLU
_EIGHT_BITS = (1, 24)  # before, QMoE on the CPU took every expert for a gated one
_FOUR_BITS = (1, 31)  # before, QMoE knew no accuracy_level, and no blocks on CUDA


def oldest_runtime(target: Target, quantize: Quantization | None) -> tuple[int, ...]:
    """Return the oldest ONNX Runtime that computes a target right."""
    if quantize == "int4":
        return _FOUR_BITS
    return _CUDA if target == "cuda" else _EIGHT_BITS if quantize == "int8" else _TESTED


def check_installed(minimum: tuple[int, ...]) -> None:
    """Raise unless what the export imports is there.

    Args:
        minimum: The oldest ONNX Runtime that will do.

    Raises:
        MoeifyError: a package is missing, or ONNX Runtime is too old.
    """
    for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError as error:
            raise MoeifyError(f"ONNX export needs {name}: pip install 'moeify[onnx]'") from error
    check_runtime(minimum)


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
