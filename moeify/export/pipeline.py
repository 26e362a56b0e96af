"""One export from start to end: trace, lower, write beside the place, prove, rename."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
from torch import nn

from moeify.errors import RefusedError, VerificationError
from moeify.export.capture.compat import traceable
from moeify.export.capture.to_onnx import to_onnx
from moeify.export.capture.trace import Capture, capture
from moeify.export.lower.contrib import set_attributes
from moeify.export.lower.layers import lower
from moeify.export.lower.quantize import Rounded
from moeify.export.prove import Case, Difference, compare, expected_cases, rounded_weights, same_outputs
from moeify.export.report import OnnxReport
from moeify.export.request import Request
from moeify.export.write import staged_file, write
from moeify.layers import MoELayer
from moeify.measure import TOLERANCE
from moeify.runtime.session import open_session, runtime_version

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_TOLERANCE = TOLERANCE["float32"]


def export(
    model: nn.Module,
    request: Request,
    example_inputs: Mapping[str, object] | None = None,
    entries: Mapping[str, str] | None = None,
) -> OnnxReport:
    """Export a model.

    Args:
        model: It stays as it is.
        request: What is asked for, checked; its dtype is the model's.
        example_inputs: See `moeify.export_onnx`.
        entries: More entries for the file's metadata.

    Raises:
        RefusedError: the model cannot be expressed.
        VerificationError: the graph gave other results than PyTorch.
        CheckpointError: the file cannot be written.
    """
    training = model.training
    try:
        with staged_file(request.path.expanduser().resolve()) as staged:
            return _Export(request, staged, entries or {}).run(model.eval(), example_inputs)
    finally:
        model.train(training)


@dataclass(frozen=True)
class _Export:
    """One run.

    Attributes:
        request: What is asked for.
        staged: Where the file is written and proved.
        entries: More entries for the metadata.
    """

    request: Request
    staged: Path
    entries: Mapping[str, str]

    def run(self, model: nn.Module, example_inputs: Mapping[str, object] | None) -> OnnxReport:
        """Leave the proved file at `staged`; in half precision the proof is that of the same graph in float32."""
        _refuse_chance(model)
        captured = capture(traceable(model), example_inputs)
        half = self.request.dtype != "float32"
        if half:
            twin = copy.deepcopy(model).float()
            report = self._prove(twin, captured.in_float32(traceable(twin)))
            del twin
        else:
            report = self._prove(model, captured)
        if not report.passed:
            raise VerificationError(f"the exported graph differs from PyTorch: {report.summary()}; nothing was written")
        if half:
            write(self._graph(captured)[0], self.staged)
        return report

    def _graph(self, captured: Capture) -> tuple[ir.Model, Rounded]:
        """Translate and lower, and say in the metadata how it was made."""
        graph = to_onnx(captured)
        rounded = lower(graph, self.request.form)
        made = {
            "target": self.request.target.name,
            "quantize": self.request.quantize or "",
            "onnxruntime": self.request.runtime,
            **{name: metadata.version(name) for name in ("torch", "transformers", "onnx", "onnxscript")},
        }
        graph.metadata_props.update({f"moeify.{key}": value for key, value in {**made, **self.entries}.items()})
        return graph, rounded

    def _prove(self, model: nn.Module, captured: Capture) -> OnnxReport:
        """Write the graph of a float32 model and run it beside PyTorch."""
        graph, rounded = self._graph(captured)
        write(graph, self.staged)
        session = open_session(self.staged, provider="cpu")
        cases = expected_cases(model, captured.interface)
        rounding = None
        if rounded:
            with rounded_weights(captured.model, rounded):
                measured = compare(session, captured.interface, expected_cases(captured.model, captured.interface))
            if self._give_up_exactness(graph):
                session = open_session(self.staged, provider="cpu")
            rounding = compare(session, captured.interface, cases)
        else:
            measured = compare(session, captured.interface, cases)
        if not measured.relative <= _TOLERANCE:
            _refuse_draws(model, captured, cases)
        return self._report(graph, session, measured, rounding)

    def _give_up_exactness(self, graph: ir.Model) -> bool:
        """Set what makes the operators faster and less exact; returns whether the file changed."""
        operator = self.request.form.operator
        if operator is None or not operator.late_attributes:
            return False
        set_attributes(graph, operator)
        write(graph, self.staged)
        return True

    def _report(
        self, graph: ir.Model, session: InferenceSession, measured: Difference, rounding: Difference | None
    ) -> OnnxReport:
        request = self.request
        operators = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.graph)
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
            runtime=f"onnxruntime {runtime_version()}, {session.get_providers()[0]}",
            requires=request.runtime,
        )


def _refuse_chance(model: nn.Module) -> None:
    """Refuse a layer that draws which tokens a full expert keeps."""
    for name, layer in model.named_modules():
        limited = isinstance(layer, MoELayer) and layer.eval_capacity_factor is not None
        if limited and layer.config.drop_order == "random":
            raise RefusedError(
                f"{name} draws at random which tokens a full expert keeps, and a graph cannot draw what PyTorch does: "
                "lift the limit with moeify.set_capacity(model, None), or use another drop_order"
            )


def _refuse_draws(model: nn.Module, captured: Capture, cases: list[Case]) -> None:
    """Refuse a model that gives something else on the same inputs: its graph need not be wrong."""
    if not same_outputs(cases, expected_cases(model, captured.interface)):
        raise RefusedError(
            f"{type(model).__name__} draws random numbers: PyTorch itself gives something else the second time; export "
            "a part of it that does not, or give it what it draws in example_inputs"
        )
