"""`moeify.export_onnx`: trace, lower, write beside, prove, rename."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from moeify.errors import ConfigError, RefusedError, VerificationError
from moeify.export.report import OnnxReport, Quantization, Target
from moeify.export.requirements import check_installed, oldest_runtime, package_versions, runtime_version
from moeify.measure import TOLERANCE

if TYPE_CHECKING:
    import onnx_ir as ir

    from moeify.export.capture import Interface
    from moeify.export.lower_contrib import Rounded
    from moeify.export.prove import Case, Difference

TARGETS: tuple[Target, ...] = get_args(Target)
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
_HALF = {"float16", "bfloat16"}


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
        model: Converted by moeify, an MoE of transformers, or dense. In float32; in half precision for a GPU, with the
            targets "cuda" and "portable".
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
    check_request(Path(path), target, quantize, _name(_dtype(model)), overwrite=overwrite)
    from moeify.export.write import staged_file

    training = model.training
    try:
        with staged_file(Path(path).expanduser().resolve(), overwrite=overwrite) as staged:
            return _export(model.eval(), staged, _Request(Path(path), target, quantize, example_inputs, metadata or {}))
    finally:
        model.train(training)


@dataclass(frozen=True)
class _Request:
    """What is asked for: the arguments of `export_onnx` that the graph depends on."""

    path: Path
    target: Target
    quantize: Quantization | None
    example_inputs: Mapping[str, Any] | None
    metadata: Mapping[str, str]

    @property
    def oldest_runtime(self) -> str:
        """The oldest ONNX Runtime for the file."""
        return ".".join(map(str, oldest_runtime(self.target, self.quantize)))


def _export(model: nn.Module, staged: Path, request: _Request) -> OnnxReport:
    """Prove, then leave the file at `staged`; a model in half precision is proved by its twin in float32."""
    from moeify.export.capture import interface
    from moeify.export.restack import traceable
    from moeify.export.write import write

    _refuse_chance(model)
    dtype = _name(_dtype(model))
    if dtype not in _HALF:
        report = _prove(model, staged, request, "float32")
    else:
        twin = copy.deepcopy(model).float()
        report = _prove(twin, staged, replace(request, example_inputs=_in_float(request.example_inputs)), dtype)
        del twin
    if not report.passed:
        raise VerificationError(f"the exported graph differs from PyTorch: {report.summary()}; nothing was written")
    if dtype in _HALF:
        graph, _ = _graph(interface(traceable(model), request.example_inputs), request)
        write(graph, staged)
    return report


def _refuse_chance(model: nn.Module) -> None:
    """Refuse a layer that draws who stays in a full expert."""
    from moeify.layers import MoELayer

    for name, layer in model.named_modules():
        limited = isinstance(layer, MoELayer) and layer.eval_capacity_factor is not None
        if limited and layer.config.drop_order == "random":
            raise RefusedError(
                f"{name} draws at random which tokens a full expert keeps, and a graph cannot draw what PyTorch does: "
                "lift the limit with moeify.set_capacity(model, None), or use another drop_order"
            )


def _in_float(inputs: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Give numbers in half precision the dtype of the twin."""
    if inputs is None:
        return None
    return {n: v.float() if isinstance(v, Tensor) and _name(v.dtype) in _HALF else v for n, v in inputs.items()}


def _prove(model: nn.Module, staged: Path, request: _Request, dtype: str) -> OnnxReport:
    """Write the graph of a float32 model and run it beside PyTorch."""
    from moeify.export.capture import interface
    from moeify.export.generation import open_session
    from moeify.export.prove import compare, expected_cases
    from moeify.export.restack import traceable
    from moeify.export.write import write

    traced = traceable(model)
    captured = interface(traced, request.example_inputs)
    graph, rounded = _graph(captured, request)
    write(graph, staged)
    cases = expected_cases(model, captured)
    session = open_session(staged, provider="cpu")
    if request.quantize is None:
        measured, rounding = compare(session, captured, cases), None
    else:
        measured = compare(session, captured, _rounded_cases(traced, captured, rounded))
        if _finish_quantized(graph, staged, request):
            session = open_session(staged, provider="cpu")
        rounding = compare(session, captured, cases)
    if not measured.relative <= TOLERANCE["float32"]:
        _refuse_draws(model, captured, cases)
    return _report(request, dtype, graph, measured, rounding)


def _refuse_draws(model: nn.Module, captured: Interface, cases: list[Case]) -> None:
    """Refuse a model that gives something else on the same inputs: its graph need not be wrong."""
    from moeify.export.prove import expected_cases, same_outputs

    if not same_outputs(cases, expected_cases(model, captured)):
        raise RefusedError(
            f"{type(model).__name__} draws random numbers: PyTorch itself gives something else the second time; export "
            "a part of it that does not, or give it what it draws in example_inputs"
        )


def _report(
    request: _Request, dtype: str, graph: ir.Model, measured: Difference, rounding: Difference | None
) -> OnnxReport:
    return OnnxReport(
        path=str(request.path),
        target=request.target,
        quantize=request.quantize,
        dtype=dtype,
        operators=_operators(graph),
        relative=measured.relative,
        max_abs_diff=measured.max_abs_diff,
        top1_agreement=measured.top1_agreement,
        tolerance=TOLERANCE["float32"],
        rounding=None if rounding is None else rounding.rms,
        rounding_largest=None if rounding is None else rounding.relative,
        rounding_top1=None if rounding is None else rounding.top1_agreement,
        cases=measured.cases,
        runtime=f"onnxruntime {runtime_version()}, CPUExecutionProvider",
        requires=request.oldest_runtime,
    )


def _rounded_cases(model: nn.Module, captured: Interface, rounded: Rounded) -> list[Case]:
    """What PyTorch gives with the weights that the graph holds: rounding is no excuse for a wrong graph."""
    from moeify.export.prove import expected_cases, rounded_weights

    with rounded_weights(model, rounded):
        return expected_cases(model, captured)


def _finish_quantized(graph: ir.Model, staged: Path, request: _Request) -> bool:
    """Turn on what the proof needed off; returns whether the file changed."""
    from moeify.export.lower_contrib import round_activations
    from moeify.export.write import write

    changes = request.target == "cpu" and request.quantize == "int4"
    if changes:
        round_activations(graph)
        write(graph, staged)
    return changes


def _graph(captured: Interface, request: _Request) -> tuple[ir.Model, Rounded]:
    """Trace, lower, and say in the metadata how it was made; also what was rounded, as `lower` returns it."""
    from moeify.export.graph import to_onnx
    from moeify.export.lower import lower

    graph = to_onnx(captured)
    rounded = lower(graph, request.target, request.quantize)
    made = {
        "target": request.target,
        "quantize": request.quantize or "",
        "onnxruntime": request.oldest_runtime,
        **package_versions(),
    }
    graph.metadata_props.update({f"moeify.{key}": value for key, value in {**made, **request.metadata}.items()})
    return graph, rounded


def check_request(path: Path, target: Any, quantize: Any, dtype: str, *, overwrite: bool) -> None:
    """Raise what can be said before a model is loaded; arguments as of `export_onnx`, and the model's dtype by name.

    Raises:
        ConfigError: an unknown target or quantization, or a dtype that the target does not compute in.
        MoeifyError: a package is missing or too old.
        CheckpointError: the file exists.
    """
    if target not in TARGETS:
        raise ConfigError(f"target is {target!r}: expected one of {', '.join(TARGETS)}")
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise ConfigError(f"quantize is {quantize!r}: expected one of {', '.join(QUANTIZATIONS)}, or None")
    if target == "portable" and quantize is not None:
        raise ConfigError("the portable target holds standard operators only, and QMoE is not one: use cpu or cuda")
    if dtype not in ({"float32"} if target == "cpu" else {"float32", *_HALF}):
        raise ConfigError(
            f"the model is in {dtype}, the target {target} computes in float32"
            f"{', float16 or bfloat16' * (target != 'cpu')}: load it with dtype float32, or call model.float()"
        )
    if target == "cuda" and quantize is not None and dtype not in _HALF:
        raise ConfigError(
            "QMoE on CUDA computes in float16 or bfloat16, and with float32 falls back to the CPU: load the model with "
            "dtype float16"
        )
    check_installed(oldest_runtime(target, quantize))
    from moeify.export.write import check_place

    check_place(path, overwrite=overwrite)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(model: nn.Module) -> torch.dtype:
    """The narrowest floating-point dtype of the weights."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.float32}
    return min(dtypes, key=lambda dtype: (dtype.itemsize, str(dtype)))


def _operators(graph: ir.Model) -> dict[str, int]:
    """Count the graph's operators, the most frequent first."""
    names = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.graph)
    return dict(names.most_common())
