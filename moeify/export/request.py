"""What an export is asked for, checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from moeify.errors import CheckpointError, ConfigError, MoeifyError
from moeify.export.targets import TARGETS, Form, Target, quantizations
from moeify.runtime.session import check_runtime


@dataclass(frozen=True)
class Request:
    """The settings of an export, from `check_request`.

    Attributes:
        path: The ONNX file.
        target: What it is made for.
        quantize: How the experts' weights are stored, None for the model's dtype.
        dtype: What the model is in.
    """

    path: Path
    target: Target
    quantize: str | None
    dtype: str

    @property
    def form(self) -> Form:
        """How the experts are computed."""
        return self.target.forms[self.quantize]

    @property
    def runtime(self) -> str:
        """The oldest ONNX Runtime for the file."""
        return ".".join(map(str, self.form.runtime))


def check_request(
    path: Path, target: str = "cpu", quantize: str | None = None, dtype: str | None = None, *, overwrite: bool = False
) -> Request:
    """Check everything that can be said without the model.

    Args:
        path: The ONNX file.
        target: A name in `TARGETS`.
        quantize: How to store the experts' weights; None for the model's dtype.
        dtype: What the model is in, None for the target's default.
        overwrite: Whether the file may be replaced.

    Raises:
        ConfigError: an unknown target or quantization, or a dtype that the target does not compute in.
        MoeifyError: a package is missing or too old.
        CheckpointError: the file exists.
    """
    if target not in TARGETS:
        raise ConfigError(f"target is {target!r}: expected one of {', '.join(TARGETS)}")
    chosen = TARGETS[target]
    _check_quantization(chosen, quantize)
    request = Request(path, chosen, quantize, dtype or chosen.default_dtype)
    _check_dtype(request)
    _check_installed(request.form.runtime)
    _check_place(path.expanduser(), overwrite=overwrite)
    return request


def _check_quantization(target: Target, quantize: str | None) -> None:
    if quantize in target.forms:
        return
    if quantize not in quantizations():
        raise ConfigError(f"quantize is {quantize!r}: expected one of {', '.join(quantizations())}, or None")
    others = " or ".join(other.name for other in TARGETS.values() if quantize in other.forms)
    raise ConfigError(f"the target {target.name} ({target.about}) cannot store weights in {quantize}: use {others}")


def _check_dtype(request: Request) -> None:
    target, form, dtype = request.target, request.form, request.dtype
    if dtype not in target.dtypes:
        raise ConfigError(
            f"the model is in {dtype}, the target {target.name} computes in {_or(target.dtypes)}: load it with dtype "
            "float32, or call model.float()"
        )
    if dtype not in form.dtypes:
        operator = form.operator.name if form.operator else "its operator"
        provider = (target.provider or target.name).removesuffix("ExecutionProvider")
        raise ConfigError(
            f"{operator} on {provider} computes in {_or(form.dtypes)}, and with {dtype} falls back to the CPU: "
            f"load the model with dtype {form.dtypes[0]}"
        )


def _or(names: tuple[str, ...]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _check_installed(runtime: tuple[int, ...]) -> None:
    for name in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError as error:
            raise MoeifyError(f"ONNX export needs {name}: pip install 'moeify[onnx]'") from error
    check_runtime(runtime)


def _check_place(path: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name the file, for example {path / 'model.onnx'}")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists: choose another name, or overwrite it (--overwrite)")
