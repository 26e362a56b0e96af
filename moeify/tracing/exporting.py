"""One torch.export on the meta device, set up for graphs that are read and not run.

Nothing is printed, nothing is looked up for messages that nobody reads, and code that decides by the data of a tensor
is taken one way.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.fx.config as fx_config
from torch import fx, nn
from torch.fx.experimental import symbolic_shapes
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from moeify.errors import MoeifyError
from moeify.tracing.graphs import inline_blocks
from moeify.tracing.inputs import ADVICE
from moeify.tracing.stand_in import forward_replaced

Inputs = Mapping[str, Any] | tuple[Any, ...] | torch.Tensor

_MANY = 256  # numbers that a forward may read from its inputs


def first_that_traces(module: nn.Module, candidates: Iterable[Inputs]) -> tuple[fx.GraphModule | None, MoeifyError]:
    """Return the graph for the first inputs that trace, or None and why the first of them did not."""
    failure = MoeifyError(f"the inputs of {type(module).__name__} cannot be guessed; {ADVICE}")
    for number, inputs in enumerate(candidates):
        args, kwargs = _split_inputs(inputs)
        try:
            return _export(module, args, kwargs), failure
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            if number == 0:
                failure = MoeifyError(
                    f"torch.export cannot trace {type(module).__name__}: {type(error).__name__}: {reason}; "
                    f"{ADVICE} that its forward accepts"
                )
                failure.__cause__ = error
    return None, failure


def run_without_values(module: nn.Module, inputs: Inputs) -> None:
    """Run a module on the meta device: twenty times faster than its export, and raises what its forward raises."""
    args, kwargs = _split_inputs(inputs)
    with torch.no_grad(), _silence(), _DataReads(taken=False):
        module(*args, **kwargs)


@contextmanager
def _silence() -> Iterator[None]:
    """No warnings and no logs: the reason of a failure is in what is raised."""
    logs = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logs)


class _DataReads(TorchFunctionMode):
    """What a forward reads from tensors: each `if` goes one way (`taken`), and reading a whole activation ends it.

    Which FFNs a model has does not depend on which way an `if` goes. Whoever reads hundreds of numbers was handed an
    activation where lengths belong, and torch.export would make a symbol of each, for minutes.
    """

    def __init__(self, taken: bool | None = None) -> None:
        super().__init__()
        self.taken = taken
        self.decisions = self.numbers = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        decides = func is torch.Tensor.__bool__ or (func is torch.Tensor.item and args[0].dtype is torch.bool)
        self.decisions += decides
        if decides and self.taken is not None:
            return self.taken
        self.numbers += func is torch.Tensor.item
        if self.numbers > _MANY:
            raise ValueError(f"its forward reads more than {_MANY} numbers from its inputs")
        return func(*args, **(kwargs or {}))


class DataDependent(Exception):
    """What torch.export says of an `if` on data, as no RuntimeError: for those it prints the graph."""


@contextmanager
def quiet_where_undecided(module: nn.Module) -> Iterator[None]:
    """Raise `DataDependent` from a module's forward in the place of torch's error."""
    if len(list(module.named_modules())) < len(list(module.named_modules(remove_duplicate=False))):
        yield  # torch.export loses the paths of modules that several share when a forward is not their class's own
        return
    original = module.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except symbolic_shapes.GuardOnDataDependentSymNode as error:
            raise DataDependent(str(error)) from error

    with forward_replaced(module, forward):
        yield


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    """Export a module; where it branches on data, try one way and then the other."""
    reads = _DataReads()
    try:
        return _export_with(reads, module, args, kwargs)
    except (DataDependent, symbolic_shapes.GuardOnDataDependentSymNode) as error:
        if not reads.decisions:
            raise
        failures = []
        for taken in (False, True):
            try:
                return _export_with(_DataReads(taken), module, args, kwargs)
            except Exception as failure:
                failures.append(failure)
        either_way = str(failures[0]) == str(failures[1])
        raise (failures[0] if either_way else error) from error


def _export_with(reads: _DataReads, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.GraphModule:
    fast_path, traces = torch.backends.mha.get_fastpath_enabled(), fx_config.do_not_emit_stack_traces
    collects = gc.isenabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoderLayer's fused operator hides its FFN
    fx_config.do_not_emit_stack_traces = True  # nobody reads them here, and they are a third of the time
    gc.disable()  # a quarter of the time goes into looking for garbage among nodes that live on
    try:
        with _silence(), quiet_where_undecided(module), reads:
            program = torch.export.export(module, args, kwargs, strict=False)
            return inline_blocks(program.module(check_guards=False))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        fx_config.do_not_emit_stack_traces = traces
        if collects:
            gc.enable()


def _split_inputs(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), {name: pytree.tree_map(to_meta, value) for name, value in inputs.items()}
    positional = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    return tuple(pytree.tree_map(to_meta, positional)), {}


def to_meta(value: Any) -> Any:
    """Return a tensor of the same shape without memory, a parameter for a parameter, and anything else as it is."""
    if isinstance(value, nn.Parameter):
        return nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=value.requires_grad)
    return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value
