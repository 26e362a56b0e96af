"""A model is traced once, and refused with the place in its code where that does not go.

In half precision the graph of the file and the graph of the proof come from the same trace: the second is the first
with float32 in the place of half precision.
"""

from __future__ import annotations

import copy
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from moeify.contract.stock_experts import through_moeify
from moeify.errors import RefusedError
from moeify.export.capture.clamped_gate import NAME, offer_export_experts
from moeify.export.capture.compat import HALF, ExactNumbers, broadcast_padding, unsqueeze_real_parts
from moeify.export.capture.interface import FlatModel, Interface, choose_interface
from moeify.tracing.exporting import quiet_where_undecided

_ONNX_FLOAT = 1
PREFIX = "model."  # the attribute under which `FlatModel` holds the model
_SPECIALIZED = re.compile(
    r"\[(\d+)\]\.size\(\)\[(\d+)\] as dynamic but your code specialized it to be a constant \((\d+)\)"
)


@dataclass(frozen=True)
class Capture:
    """What was learnt of a model.

    Attributes:
        model: What was traced.
        interface: The inputs and outputs of the graph.
        program: The trace, of a `FlatModel`.
    """

    model: nn.Module
    interface: Interface
    program: ExportedProgram

    def in_float32(self, twin: nn.Module) -> Capture:
        """Return the same trace in float32.

        Args:
            twin: The traced model in float32, whose weights the trace gets.
        """
        graph_module = copy.deepcopy(self.program.graph_module)
        for module in graph_module.modules():
            if isinstance(module, fx.GraphModule):
                _to_float32(module.graph)
        weights = {f"{PREFIX}{name}": tensor for name, tensor in twin.state_dict(keep_vars=True).items()}
        with undisturbed():
            program = self.program._update(
                graph_module,
                self.program.graph_signature,
                state_dict={name: weights[name] for name in self.program.state_dict},
                constants=pytree.tree_map(_float32, self.program.constants),
            )
        return Capture(twin, self.interface.in_float32(), program)


def capture(model: nn.Module, example_inputs: Mapping[str, object] | None) -> Capture:
    """Choose the inputs of a model and trace it.

    Args:
        model: From `traceable`, in evaluation mode.
        example_inputs: Keyword arguments of the forward; None makes them up for a transformers model.

    Raises:
        MoeifyError: the inputs cannot be made up.
        RefusedError: torch.export cannot trace the model; the message names the place.
    """
    interface = choose_interface(model, example_inputs)
    offer_export_experts()
    with undisturbed(), broadcast_padding(), through_moeify(model, NAME):
        program = _trace(FlatModel(model, interface), interface)
    unsqueeze_real_parts(program.graph_module)
    return Capture(model, interface, program)


def _trace(module: FlatModel, interface: Interface) -> ExportedProgram:
    shapes = tuple(dict.fromkeys(axes, Dim.DYNAMIC) for axes in interface.axes.values())
    try:
        with quiet_where_undecided(module), ExactNumbers():
            return torch.export.export(module, tuple(interface.inputs.values()), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        reason = _fixed_size(error, interface) or f"{cause_of(error)}{_place(error)}"
        raise RefusedError(f"torch.export cannot trace {type(module.model).__name__}: {reason}") from error


def _fixed_size(error: BaseException, interface: Interface) -> str | None:
    """Say which dimension the model wants fixed, if that is what went wrong."""
    found = _SPECIALIZED.search(str(error))
    if found is None:
        return None
    name, axis = list(interface.inputs)[int(found[1])], int(found[2])
    return f"it works only where the {interface.axes[name][axis]} of {name} is {found[3]}; the graph needs it dynamic"


def _to_float32(graph: fx.Graph) -> None:
    """Let a graph compute in float32 what it computes in half precision; in place."""
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(_float32, node.meta["val"])
        node.args, node.kwargs = pytree.tree_map(_float32, (node.args, node.kwargs))
        if node.target is torch.ops.onnx_symbolic._symbolic.default:
            inputs, operator, _, *rest = node.args
            node.args = (inputs, operator, _ONNX_FLOAT, *rest)  # clamped gates: the dtype of y, by its ONNX number


def _float32(value: object) -> object:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF else value
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value


def cause_of(error: BaseException) -> str:
    """Return the first line of the error at the bottom."""
    bottom = _chain(error)[0]
    line = next((line.strip() for line in str(bottom).splitlines() if line.strip()), "")
    return f"{type(bottom).__name__}: {line}"


def _place(error: BaseException) -> str:
    """Where the model's own code stood, if it did: what torch raises of itself may have been caught there by torch."""
    library = str(Path(torch.__file__).parent)
    for cause in _chain(error):
        frames = traceback.extract_tb(cause.__traceback__)
        own = [f for f in frames if not f.filename.startswith(library) and f.name != "__torch_function__"]
        if own:
            return f" (in {own[-1].name}, {own[-1].filename}:{own[-1].lineno})"
    return ""


def _chain(error: BaseException) -> list[BaseException]:
    """An error and its causes, the bottom first."""
    return [*(_chain(error.__cause__) if error.__cause__ is not None else []), error]


@contextmanager
def undisturbed() -> Iterator[None]:
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
