"""One torch.export on the meta device, for graphs that are read and never run.

Nothing is printed, nothing is collected for messages that nobody reads, and each `if` on the data of a tensor goes one
way.
"""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps

import torch
import torch.fx.config as fx_config
from torch import fx, nn
from torch.fx.experimental import symbolic_shapes
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from moeify.errors import MoeifyError, first_line
from moeify.tracing.blocks import equal_stacks, shortened
from moeify.tracing.graphs import inline_blocks
from moeify.tracing.inputs import ADVICE
from moeify.tracing.stand_in import forward_replaced
from moeify.tracing.unroll import Uneven, unroll

Inputs = Mapping[str, object] | tuple[object, ...] | torch.Tensor

_MAX_READS = 256  # numbers that a forward may read from its inputs


def first_that_traces(module: nn.Module, candidates: Iterable[Inputs]) -> tuple[fx.GraphModule | None, MoeifyError]:
    """Return the graph for the first inputs that trace, or None and why the first of them did not."""
    failure = MoeifyError(f"the inputs of {type(module).__name__} cannot be guessed; {ADVICE}")
    for number, inputs in enumerate(candidates):
        args, kwargs = _split_inputs(inputs)
        try:
            return _export(module, args, kwargs), failure
        except Exception as error:
            if number == 0:
                failure = MoeifyError(
                    f"torch.export cannot trace {type(module).__name__}: {type(error).__name__}: {first_line(error)}; "
                    f"{ADVICE} that its forward accepts"
                )
                failure.__cause__ = error
    return None, failure


def run_without_values(module: nn.Module, inputs: Inputs) -> None:
    """Run a module on the meta device, twenty times faster than its export; raise what its forward raises."""
    args, kwargs = _split_inputs(inputs)
    with torch.no_grad(), _silence(), _DataReads(answer=False):
        module(*args, **kwargs)


@contextmanager
def _silence() -> Iterator[None]:
    """Turn off warnings and logs inside the block: the reason of a failure is in the exception."""
    logs = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logs)


class _DataReads(TorchFunctionMode):
    """A count of what a forward reads from the data of tensors; each `if` on data gets `answer`.

    The FFNs of a model do not depend on the way that an `if` goes. A forward that reads hundreds of numbers has got an
    activation in the place of lengths; torch.export would make a symbol of each number, for minutes, so it is stopped.
    """

    def __init__(self, answer: bool | None = None) -> None:
        super().__init__()
        self.answer = answer
        self.decisions = self.numbers = 0

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        item = func is torch.Tensor.item
        decides = func is torch.Tensor.__bool__ or (
            item and isinstance(args[0], torch.Tensor) and args[0].dtype is torch.bool
        )
        self.decisions += decides
        if decides and self.answer is not None:
            return self.answer
        self.numbers += item
        if self.numbers > _MAX_READS:
            raise ValueError(f"its forward reads more than {_MAX_READS} numbers from its inputs")
        return func(*args, **_with_value(func, args, dict(kwargs or {})))


def _with_value(func: object, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, object]:
    """Keep a number that a forward writes down as a tensor: on the meta device it would be lost.

    A tensor without dimensions on the CPU goes with tensors on any device.
    """
    if func is torch.tensor and args and isinstance(args[0], int | float):
        kwargs["device"] = "cpu"
    return kwargs


class DataDependent(Exception):
    """torch.export met an `if` on data. This is no RuntimeError, because for those torch prints the graph."""


@contextmanager
def quiet_where_undecided(module: nn.Module) -> Iterator[None]:
    """Let a module's forward raise `DataDependent` in place of torch's error, which prints the graph."""
    if len(list(module.named_modules())) < len(list(module.named_modules(remove_duplicate=False))):
        yield  # torch.export loses the paths of shared modules when a forward is not that of the class
        return
    original = module.forward

    @wraps(original)
    def forward(*args: object, **kwargs: object) -> object:
        try:
            return original(*args, **kwargs)
        except symbolic_shapes.GuardOnDataDependentSymNode as error:
            raise DataDependent(str(error)) from error

    with forward_replaced(module, forward):
        yield


def _export(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> fx.GraphModule:
    """Export a module; where it branches on data, try one way and then the other."""
    reads = _DataReads()
    try:
        return _export_with(reads, module, args, kwargs)
    except (DataDependent, symbolic_shapes.GuardOnDataDependentSymNode) as error:
        if not reads.decisions:
            raise
        failures = []
        for answer in (False, True):
            try:
                return _export_with(_DataReads(answer), module, args, kwargs)
            except Exception as failure:
                failures.append(failure)
        either_way = str(failures[0]) == str(failures[1])
        raise (failures[0] if either_way else error) from error


def _export_with(
    reads: _DataReads, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> fx.GraphModule:
    with _fast_export(), _silence(), quiet_where_undecided(module):
        with torch.no_grad(), _DataReads(answer=False):
            stacks = equal_stacks(module, lambda: module(*args, **kwargs))
        with reads:
            try:
                with shortened(stacks):
                    graph_module = _exported(module, args, kwargs)
                for stack in stacks:
                    graph_module = unroll(graph_module, module, stack)
                return graph_module
            except Uneven:
                return _exported(module, args, kwargs)


def _exported(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> fx.GraphModule:
    program = torch.export.export(module, args, kwargs, strict=False)
    return inline_blocks(program.module(check_guards=False))


@contextmanager
def _fast_export() -> Iterator[None]:
    """Turn off what hides an FFN, and what takes long and is of no use here."""
    fast_path, collects = torch.backends.mha.get_fastpath_enabled(), gc.isenabled()
    stack_traces = getattr(fx_config, "do_not_emit_stack_traces", None)  # None: torch 2.11 has no such setting
    torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoderLayer's fused operator hides its FFN
    if stack_traces is not None:
        fx_config.do_not_emit_stack_traces = True  # collecting them is a third of the time
    gc.disable()  # a quarter of the time goes into looking for garbage among nodes that live on
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        if stack_traces is not None:
            fx_config.do_not_emit_stack_traces = stack_traces
        if collects:
            gc.enable()


def _split_inputs(inputs: Inputs) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return positional and keyword arguments on the meta device."""
    if isinstance(inputs, Mapping):
        return (), {name: pytree.tree_map(to_meta, value) for name, value in inputs.items()}
    positional = (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    return tuple(pytree.tree_map(to_meta, positional)), {}


def to_meta(value: object) -> object:
    """Return a tensor of the same shape without memory, a parameter for a parameter, and anything else as it is."""
    if isinstance(value, nn.Parameter):
        return nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=value.requires_grad)
    return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value
