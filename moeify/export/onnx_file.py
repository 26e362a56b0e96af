"""`moeify.export_onnx`: trace, lower, write beside, prove, rename."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from moeify.errors import ConfigError, VerificationError
from moeify.export.requirements import MINIMUM, check_installed, package_versions, runtime_version
from moeify.tolerances import TOLERANCE

if TYPE_CHECKING:
    import onnx_ir as ir

    from moeify.export.prove import Difference

Target = Literal["cpu", "cuda", "portable"]
Quantization = Literal["int8", "int4"]
TARGETS = ("cpu", "portable")
QUANTIZATIONS = ("int8", "int4")


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and its proof.

    Attributes:
        path: The file.
        target: What it was made for.
        quantize: How the experts' weights are stored, None for as they were.
        operators: How often each operator occurs in the graph, functions of the model named with their domain.
        relative: Largest difference from PyTorch by its largest value.
        max_abs_diff: Largest difference.
        top1_agreement: Share of rows whose largest value is at the same place.
        tolerance: Largest relative difference that passes, None where none is promised.
        cases: The shapes of the proof.
        runtime: The ONNX Runtime that ran the proof, and its provider.
        requires: The oldest ONNX Runtime for this file.
    """

    path: str
    target: str
    quantize: str | None
    operators: Mapping[str, int]
    relative: float
    max_abs_diff: float
    top1_agreement: float
    tolerance: float | None
    cases: tuple[str, ...]
    runtime: str
    requires: str

    @property
    def passed(self) -> bool:
        """Whether the promise holds."""
        return math.isfinite(self.relative) and (self.tolerance is None or self.relative <= self.tolerance)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    def summary(self) -> str:
        """Return one line for people."""
        promise = "no exactness promised" if self.tolerance is None else f"tolerance {self.tolerance:.0e}"
        return (
            f"relative difference {self.relative:.2e} ({promise}) in {self.runtime}, "
            f"top-1 agreement {self.top1_agreement:.2%}, on {', '.join(self.cases)}"
        )


def export_onnx(
    model: nn.Module,
    path: str | Path,
    target: Target = "cpu",
    quantize: Quantization | None = None,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> OnnxReport:
    """Write a model for ONNX Runtime; the file appears whole, after it agreed with PyTorch, or not at all.

    A causal language model gets keys and values as inputs and outputs (`past_key_values.0.key`, `present.0.key`, …), so
    that one graph serves prompts and single tokens; batch and sequence are dynamic.

    Args:
        model: Converted by moeify, an MoE of transformers, or dense. In float32.
        path: The ONNX file; weights of large models go into `PATH.data` beside it.
        target: "portable" uses standard ONNX only; "cpu" also ONNX Runtime's own operators where they are faster;
            "cuda" what onnxruntime-gpu has kernels for.
        quantize: Store the experts' weights in 8 or 4 bits.
        example_inputs: Keyword arguments of the forward, for a model that is not from transformers or is to be exported
            with other inputs than its usual ones.
        overwrite: Replace the file if it exists.
        metadata: More entries for the file's metadata.

    Returns:
        The proof.

    Raises:
        MoeifyError: a package is missing or too old.
        ConfigError: an unknown target, or a dtype that it does not compute in.
        RefusedError: the model cannot be expressed; the message says what and where.
        VerificationError: the graph gave other results than PyTorch.
        CheckpointError: the file cannot be written.
    """
    check_request(Path(path), target, quantize, overwrite=overwrite)
    from moeify.export.write import staged_file

    _check_dtype(model, target)
    training = model.training
    try:
        with staged_file(Path(path).expanduser().resolve(), overwrite=overwrite) as staged:
            return _export(model.eval(), staged, Path(path), target, quantize, example_inputs, metadata or {})
    finally:
        model.train(training)


def _export(
    model: nn.Module,
    staged: Path,
    path: Path,
    target: Target,
    quantize: Quantization | None,
    example_inputs: Mapping[str, Any] | None,
    metadata: Mapping[str, str],
) -> OnnxReport:
    from moeify.export.capture import interface
    from moeify.export.generation import open_session
    from moeify.export.graph import to_onnx
    from moeify.export.lower_standard import lower_standard
    from moeify.export.prove import compare, expected_cases
    from moeify.export.write import write

    captured = interface(model, example_inputs)
    cases = expected_cases(model, captured)
    graph = to_onnx(captured)
    lower_standard(graph)
    made = {"target": target, "quantize": quantize or "", "onnxruntime": _version(MINIMUM), **package_versions()}
    graph.metadata_props.update({f"moeify.{key}": value for key, value in {**made, **metadata}.items()})
    operators = _operators(graph)
    write(graph, staged)
    del graph
    session = open_session(staged, provider="cpu")
    report = _report(path, target, quantize, operators, compare(session, captured, cases), session)
    if not report.passed:
        raise VerificationError(f"the exported graph differs from PyTorch: {report.summary()}; nothing was written")
    return report


def check_request(path: Path, target: str, quantize: str | None, *, overwrite: bool) -> None:
    """Raise what can be said before a model is loaded; arguments as of `export_onnx`.

    Raises:
        ConfigError: an unknown target or quantization.
        MoeifyError: a package is missing or too old.
        CheckpointError: the file exists.
    """
    if target not in TARGETS:
        raise ConfigError(f"target is {target!r}: expected one of {', '.join(TARGETS)}")
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise ConfigError(f"quantize is {quantize!r}: expected one of {', '.join(QUANTIZATIONS)}, or None")
    check_installed()
    from moeify.export.write import check_place

    check_place(path, overwrite=overwrite)


def _check_dtype(model: nn.Module, target: str) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32 and target != "cuda":
            raise ConfigError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}: ONNX Runtime's CPU kernels take float32; "
                "call model.float() first, or load with dtype=torch.float32"
            )


def _report(
    path: Path, target: str, quantize: str | None, operators: Mapping[str, int], measured: Difference, session: Any
) -> OnnxReport:
    provider = session.get_providers()[0]
    return OnnxReport(
        path=str(path),
        target=target,
        quantize=quantize,
        operators=operators,
        relative=measured.relative,
        max_abs_diff=measured.max_abs_diff,
        top1_agreement=measured.top1_agreement,
        tolerance=TOLERANCE["float32"],
        cases=measured.cases,
        runtime=f"onnxruntime {runtime_version()}, {provider}",
        requires=_version(MINIMUM),
    )


def _operators(graph: ir.Model) -> dict[str, int]:
    """Count the graph's operators, the most frequent first."""
    names = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.graph)
    return dict(names.most_common())


def _version(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
