"""A captured model becomes an ONNX graph with opaque expert nodes, named as the model names its weights."""

from __future__ import annotations

import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim

from moeify.errors import RefusedError
from moeify.export import clamped_gate
from moeify.export.capture import Interface
from moeify.export.complex_axes import unsqueeze_real_parts
from moeify.export.masks import broadcast_padding
from moeify.export.simplify import simplify
from moeify.export.standard import OPSET
from moeify.export.translate import translations
from moeify.hub.stock_experts import through_moeify
from moeify.tracing.exporting import quiet_where_undecided

_SPECIALIZED = re.compile(
    r"\[(\d+)\]\.size\(\)\[(\d+)\] as dynamic but your code specialized it to be a constant \((\d+)\)"
)
_PREFIX = "model."  # the attribute under which the wrapper holds the model


def to_onnx(captured: Interface) -> ir.Model:
    """Trace and translate.

    Returns:
        A model in IR whose experts are opaque nodes (see `moeify.export.translate`); weights are not copied.

    Raises:
        RefusedError: torch.export or the translation cannot carry the model; the message names the place.
    """
    clamped_gate.offer_export_experts()
    inner: Any = captured.module.model
    with _undisturbed(), broadcast_padding(), through_moeify(inner, clamped_gate.NAME):
        program = _trace(captured)
        unsqueeze_real_parts(program.graph_module)
        try:
            translated = torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=list(captured.inputs),
                output_names=list(captured.outputs),
                custom_translation_table=translations(),
                opset_version=OPSET,
                optimize=False,  # see moeify.export.simplify
                verbose=False,
            )
        except Exception as error:
            raise RefusedError(f"the model has an operator that ONNX cannot express: {_cause(error)}") from error
        assert translated is not None
        model: ir.Model = translated.model
        simplify(model)
    _name(model.graph, captured)
    return model


def _trace(captured: Interface) -> torch.export.ExportedProgram:
    shapes = tuple(dict.fromkeys(captured.axes[name], Dim.DYNAMIC) for name in captured.inputs)
    try:
        with quiet_where_undecided(captured.module):
            return torch.export.export(
                captured.module, tuple(captured.inputs.values()), dynamic_shapes=(shapes,), strict=False
            )
    except Exception as error:
        model = type(captured.module.model).__name__
        reason = _fixed_size(error, captured) or f"{_cause(error)}{_place(error)}"
        raise RefusedError(f"torch.export cannot trace {model}: {reason}") from error


def _fixed_size(error: BaseException, captured: Interface) -> str | None:
    """Say which dimension the model wants fixed, if that is what went wrong."""
    found = _SPECIALIZED.search(str(error))
    if found is None:
        return None
    name, axis = list(captured.inputs)[int(found[1])], int(found[2])
    return f"it works only where the {captured.axes[name][axis]} of {name} is {found[3]}; the graph needs it dynamic"


def _name(graph: ir.Graph, captured: Interface) -> None:
    """Give weights the names of the state dict, and the dimensions of inputs and outputs theirs."""
    for name, value in list(graph.initializers.items()):
        if name.startswith(_PREFIX):
            value.name = name.removeprefix(_PREFIX)
    symbols = {
        str(value.shape[axis]): name
        for value in graph.inputs
        if value.shape is not None
        for axis, name in captured.axes[str(value.name)].items()
    }
    for values, axes in ((graph.inputs, captured.axes), (graph.outputs, captured.output_axes)):
        for value in values:
            _name_dimensions(value, axes.get(str(value.name), {}), symbols)


def _name_dimensions(value: ir.Value, names: Mapping[int, str], symbols: Mapping[str, str]) -> None:
    """Name dimensions by their place, or by the name that an input gave to the symbol of the trace."""
    if value.shape is not None:
        value.shape = ir.Shape([names.get(axis, symbols.get(str(size), size)) for axis, size in enumerate(value.shape)])


def _cause(error: BaseException) -> str:
    """The first line of the error at the bottom."""
    bottom = _chain(error)[0]
    line = next((line.strip() for line in str(bottom).splitlines() if line.strip()), "")
    return f"{type(bottom).__name__}: {line}"


def _place(error: BaseException) -> str:
    """Where the model's own code stood, if it did: what torch raises of itself may have been caught there by torch."""
    library = str(Path(torch.__file__).parent)
    for cause in _chain(error):
        frames = [f for f in traceback.extract_tb(cause.__traceback__) if not f.filename.startswith(library)]
        if frames:
            return f" (in {frames[-1].name}, {frames[-1].filename}:{frames[-1].lineno})"
    return ""


def _chain(error: BaseException) -> list[BaseException]:
    """An error and its causes, the bottom first."""
    return [*(_chain(error.__cause__) if error.__cause__ is not None else []), error]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the exporter's notices and warnings from the caller."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
