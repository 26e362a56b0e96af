"""One export from start to end: trace, lower, write beside the place, prove, rename."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
from torch import nn

from moeify.errors import RefusedError, VerificationError
from moeify.export.capture.compat import traceable
from moeify.export.capture.interface import Interface
from moeify.export.capture.to_onnx import to_onnx
from moeify.export.capture.trace import Capture, capture
from moeify.export.lower.contrib import set_attributes
from moeify.export.lower.layers import lower
from moeify.export.lower.weights import Rounded
from moeify.export.onnx_file import DATA_SUFFIX, Request
from moeify.export.prove import Case, Difference, compare, expected_cases, rounded_weights, same_outputs
from moeify.export.report import OnnxReport
from moeify.export.write import write
from moeify.files.staging import staged_file
from moeify.layers import MoELayer
from moeify.layers.quantized_experts import QuantizedExperts
from moeify.measure import TOLERANCE
from moeify.runtime.session import check_loads, open_session, runtime_version

_TOLERANCE = TOLERANCE["float32"]
_MAKERS = ("torch", "transformers", "onnx", "onnxscript")


def export(
    model: nn.Module, request: Request, example_inputs: Mapping[str, object] | None, entries: Mapping[str, str]
) -> OnnxReport:
    """Export a model; it stays as it is.

    Args:
        model: Of the request's dtype.
        request: What is asked for, checked.
        example_inputs: Keyword arguments of the forward, None to make them up.
        entries: More entries for the file's metadata.

    Raises:
        MoeifyError: see `moeify.export_onnx`.
    """
    training = model.training
    try:
        with staged_file(request.path, overwrite=request.overwrite, companion=DATA_SUFFIX) as staged:
            return _Export(request, staged, entries).run(model.eval(), example_inputs)
    finally:
        model.train(training)


@dataclass(frozen=True)
class _Written:
    """What is left of a float32 model when its graph is written.

    Attributes:
        interface: The graph's inputs and outputs.
        operators: How often each operator occurs in it.
        cases: What PyTorch gives, with rounded weights if some are rounded in the graph.
        original: What PyTorch gives with its own weights, if some are rounded.
        late: The graph with the attributes that it gets after the proof, if there are any.
    """

    interface: Interface
    operators: Counter[str]
    cases: list[Case]
    original: list[Case] | None
    late: ir.Model | None


class _Export:
    """One run, which leaves the proved file at `staged`."""

    def __init__(self, request: Request, staged: Path, entries: Mapping[str, str]) -> None:
        self.request, self.staged, self.entries = request, staged, entries

    def run(self, model: nn.Module, example_inputs: Mapping[str, object] | None) -> OnnxReport:
        """Export a model; in half precision the proof is that of the same graph in float32."""
        _refuse(model)
        captured, half = capture(traceable(model), example_inputs), self.request.dtype != "float32"

        def exact() -> nn.Module:
            return copy.deepcopy(model).float() if half else model

        report = self._prove(exact, captured)
        if not report.passed:
            raise VerificationError(f"the exported graph differs from PyTorch: {report.summary()}; nothing was written")
        if half:
            write(self._graph(captured)[0], self.staged)
            check_loads(self.staged)
        return report

    def _graph(self, captured: Capture) -> tuple[ir.Model, Rounded]:
        """Translate and lower, and say in the metadata how it was made."""
        graph, request = to_onnx(captured), self.request
        rounded = lower(graph, request.form)
        made = {"target": request.target.name, "quantize": request.quantize or "", "onnxruntime": request.runtime}
        made |= {name: metadata.version(name) for name in _MAKERS} | dict(self.entries)
        graph.metadata_props.update({f"moeify.{key}": value for key, value in made.items()})
        return graph, rounded

    def _prove(self, exact: Callable[[], nn.Module], captured: Capture) -> OnnxReport:
        """Write the graph of a float32 model and run it; PyTorch has run before, and what it needed is forgotten.

        Args:
            exact: Gives the model in float32.
            captured: The trace, in the dtype of the request.
        """
        written = self._write_exact(exact(), captured)
        gc.collect()  # traces and graphs are cycles, and hold the weights
        session, interface = open_session(self.staged, provider="cpu"), written.interface
        measured, rounding = compare(session, interface, written.cases), None
        if written.original is not None:
            if written.late is not None:
                write(written.late, self.staged)
                session = open_session(self.staged, provider="cpu")
            rounding = compare(session, interface, written.original)
        cases = written.original or written.cases
        if not measured.relative <= _TOLERANCE and not same_outputs(cases, expected_cases(model := exact(), interface)):
            raise RefusedError(
                f"{type(model).__name__} draws random numbers: PyTorch itself gives something else the second time; "
                "export a part of it that does not, or give it what it draws in example_inputs"
            )
        runtime = f"onnxruntime {runtime_version()}, {session.get_providers()[0]}"
        return self._report(written.operators, runtime, measured, rounding)

    def _write_exact(self, model: nn.Module, captured: Capture) -> _Written:
        """Write the graph of a float32 model and run the model."""
        if self.request.dtype != "float32":
            captured = captured.in_float32(traceable(model))
        graph, rounded = self._graph(captured)
        write(graph, self.staged)
        cases, original, late = expected_cases(model, captured.interface), None, None
        if rounded:
            original = cases
            with rounded_weights(captured.model, rounded):
                cases = expected_cases(captured.model, captured.interface)
            operator = self.request.form.operator
            if operator is not None and operator.late_attributes:
                set_attributes(graph, operator)
                late = graph
        operators = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.graph)
        return _Written(captured.interface, operators, cases, original, late)

    def _report(
        self, operators: Counter[str], runtime: str, measured: Difference, rounding: Difference | None
    ) -> OnnxReport:
        request = self.request
        return OnnxReport(
            path=str(request.path),
            target=request.target.name,
            quantize=request.quantize,
            dtype=request.dtype,
            operators=dict(operators.most_common()),
            relative=measured.relative,
            max_abs_diff=measured.max_abs_diff,
            top1_agreement=measured.top1_agreement,
            tolerance=_TOLERANCE,
            rounding=None if rounding is None else rounding.rms,
            rounding_largest=None if rounding is None else rounding.relative,
            rounding_top1=None if rounding is None else rounding.top1_agreement,
            cases=measured.cases,
            runtime=runtime,
            requires=request.runtime,
        )


def _refuse(model: nn.Module) -> None:
    """Refuse experts that are quantized for PyTorch, and a layer that draws which tokens a full expert keeps."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedExperts):
            raise RefusedError(
                f"{name} is quantized by moeify.quantize_experts, which ONNX has no operator for: export the model as "
                "it was before, with quantize (--quantize) for the file's own int8 or int4"
            )
        limited = isinstance(layer, MoELayer) and layer.eval_capacity_factor is not None
        if limited and layer.config.drop_order == "random":
            raise RefusedError(
                f"{name} draws at random which tokens a full expert keeps, and a graph cannot draw what PyTorch does: "
                "lift the limit with moeify.set_capacity(model, None), or use another drop_order"
            )
