"""`moeify.export_onnx`: what is asked for, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from moeify.errors import ConfigError, MoeifyError
from moeify.export.report import OnnxReport
from moeify.export.targets import TARGETS, Form, Target, quantizations
from moeify.files.staging import check_file
from moeify.runtime.session import check_runtime

if TYPE_CHECKING:
    from torch import nn

MODEL_FILE = "model.onnx"  # in a folder, as optimum calls it
DATA_SUFFIX = ".data"  # of the file beside the graph that holds large weights
_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


def export_onnx(
    model: nn.Module, path: str | Path, target: str = "cpu", quantize: str | None = None, *,
    example_inputs: Mapping[str, object] | None = None, overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> OnnxReport:  # fmt: skip
    """Write a model for ONNX Runtime; the file appears after it agreed with PyTorch, or not at all.

    A causal language model gets keys and values as inputs and outputs, so that one graph serves prompts and single
    tokens. Batch and sequence are dynamic.

    Args:
        model: Converted by moeify, an MoE of transformers, or dense; in a dtype that the target computes in.
        path: The ONNX file. Weights of large models go into `PATH.data` beside it.
        target: "portable" uses standard ONNX only; "cpu" also ONNX Runtime's own operators where they are faster;
            "cuda" what onnxruntime-gpu has kernels for.
        quantize: "int8" or "int4" stores the experts' weights so.
        example_inputs: Keyword arguments of the forward; None makes them up for a model of transformers.
        overwrite: Replace the file if it exists.
        metadata: More entries for the file's metadata.

    Raises:
        MoeifyError: a package is missing or too old.
        ConfigError: an unknown target, or a dtype that it does not compute in.
        RefusedError: the model cannot be expressed; the message says what and where.
        VerificationError: the graph gave other results than PyTorch.
        CheckpointError: the file cannot be written.
    """
    from moeify.arguments import check_model  # loads torch, which checking a request does without

    check_model(model)
    dtypes = {(p.dtype.itemsize, str(p.dtype)) for p in model.parameters() if p.is_floating_point()}
    _, narrowest = min(dtypes, default=(4, "torch.float32"))
    request = check_request(Path(path), target, quantize, narrowest.removeprefix("torch."), overwrite=overwrite)
    from moeify.export.pipeline import export  # needs the packages that were just checked

    return export(model, request, example_inputs, metadata or {})


@dataclass(frozen=True)
class Request:
    """The settings of an export, from `check_request`.

    Attributes:
        path: The ONNX file.
        target: What it is made for.
        quantize: How the experts' weights are stored, None for the model's dtype.
        dtype: What the model is in.
        overwrite: Replace the file if it exists.
    """

    path: Path
    target: Target
    quantize: str | None
    dtype: str
    overwrite: bool

    @property
    def form(self) -> Form:
        """How the experts are computed."""
        return self.target.forms[self.quantize]

    @property
    def runtime(self) -> str:
        """The oldest ONNX Runtime for the file."""
        return ".".join(map(str, self.form.runtime))


def check_request(path: Path, target: str, quantize: str | None, dtype: str | None, *, overwrite: bool) -> Request:
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
    if quantize not in {None, *quantizations()}:
        raise ConfigError(f"quantize is {quantize!r}: expected one of {', '.join(quantizations())}, or None")
    request = Request(path, TARGETS[target], quantize, dtype or TARGETS[target].default_dtype, overwrite)
    _check_form(request)
    for name in _PACKAGES:
        try:
            import_module(name)
        except ImportError as error:
            raise MoeifyError(f"ONNX export needs {name}: pip install 'moeify[onnx]'") from error
    check_runtime(request.form.runtime)
    check_file(path, overwrite=overwrite, companion=DATA_SUFFIX)
    return request


def _check_form(request: Request) -> None:
    """Check that the target stores and computes what is asked for."""
    target, quantize, dtype = request.target, request.quantize, request.dtype
    if quantize not in target.forms:
        others = " or ".join(other.name for other in TARGETS.values() if quantize in other.forms)
        raise ConfigError(f"the target {target.name} ({target.about}) cannot store weights in {quantize}: use {others}")
    if dtype not in target.dtypes:
        raise ConfigError(
            f"the model is in {dtype}, the target {target.name} computes in {_or(target.dtypes)}: load it with dtype "
            "float32, or call model.float()"
        )
    if dtype not in request.form.dtypes:
        operator = request.form.operator.name if request.form.operator else "it"
        provider = (target.provider or target.name).removesuffix("ExecutionProvider")
        raise ConfigError(
            f"{operator} on {provider} computes in {_or(request.form.dtypes)}, and with {dtype} falls back to the CPU: "
            f"load the model with dtype {request.form.dtypes[0]}"
        )


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
