"""Every MoE layer beside the dense FFN that it replaces, on the input that the FFN gets in the dense model.

So no rounding piles up over depth. Both are computed in float64, whatever the model computes in: a right layer differs
by 1e-15 then, and a wrong one by what is wrong with it. The models are run once each, with hooks at their layers.

Shape legend: B sequences, L positions, H hidden size, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moeify.layers.implementations import LOOP, OURS
from moeify.measure import name_of, row_difference, without_shared_nan
from moeify.proving.report import LayerReport

_POSITIONS = 64  # of each sequence, the last ones: what a layer is computed on
_SUM = 5  # decimals of what the weights of a token's experts sum to

Chains: TypeAlias = Mapping[str, Sequence[str]]
"""The modules of each dense FFN in the order in which they run, by the path of the MoE layer."""


@dataclass(frozen=True)
class Call:
    """One call of a dense FFN.

    Attributes:
        x: Its input, (B, L, H) or any other shape, the last positions.
        wide: What it gives in float64 for x; None if it does not run in float64.
        y: What it gave, for all positions.
        own: What it gave for x.
    """

    x: Tensor
    wide: Tensor | None
    y: Tensor
    own: Tensor


Calls: TypeAlias = dict[str, list[Call]]


def chains_of(moe: nn.Module) -> Chains:
    """Return the FFNs that the MoE layers of a model stand for: by the plan in its config, else by their own names.

    Args:
        moe: A model whose MoE layers hold a module `experts`, as transformers has them; it may have no weights.
    """
    entry: Any = getattr(getattr(moe, "config", None), "quantization_config", None)
    sites = entry["plan"]["sites"] if isinstance(entry, dict) and "plan" in entry else []
    bypassed = {site["path"]: site["bypassed"] for site in sites}
    layers = (path for path, module in moe.named_modules() if path and _is_moe(module))
    return {path: (*bypassed.get(path, ()), path) for path in layers}


def _is_moe(module: nn.Module) -> bool:
    return isinstance(module._modules.get("experts"), nn.Module)


@contextmanager
def recording(dense: nn.Module, chains: Chains) -> Iterator[Calls]:
    """Keep what the FFNs of a dense model get and give while it runs; those that it does not have are left out."""
    modules, calls = dict(dense.named_modules()), Calls()
    with ExitStack() as hooks:
        for path, chain in chains.items():
            if all(part in modules and not _is_moe(modules[part]) for part in chain):
                recorder = _Recorder([modules[part] for part in chain], calls.setdefault(path, []))
                first, last = recorder.chain[0], recorder.chain[-1]
                hooks.callback(first.register_forward_pre_hook(recorder.before, with_kwargs=True).remove)
                hooks.callback(last.register_forward_hook(recorder.after).remove)
        yield calls
    for path in [path for path, found in calls.items() if not found]:
        del calls[path]


@dataclass
class _Recorder:
    """The hooks at one dense FFN."""

    chain: list[nn.Module]
    calls: list[Call]
    x: Tensor | None = None
    busy: bool = False

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.busy:
            self.x = _input(args, kwargs)

    def after(self, _: nn.Module, args: object, output: object) -> None:
        x, y = self.x, _first(output)
        if self.busy or x is None or y is None or x.shape != y.shape:
            return  # not an FFN: it has the name of one
        self.busy = True
        try:
            wide = _in_float64(self._run, self.chain, _last(x))
        finally:
            self.busy = False
        self.calls.append(Call(_last(x), wide, y, _last(y)))

    def _run(self, x: Tensor) -> Tensor | None:
        for module in self.chain:
            found = _first(_widened(module, x))
            if found is None:
                return None
            x = found
        return x


@contextmanager
def comparing(moe: nn.Module, calls: Calls) -> Iterator[dict[str, _Comparer]]:
    """Compare the layers of an MoE with recorded calls while it runs."""
    with ExitStack() as hooks:
        comparers = {path: _Comparer(moe.get_submodule(path), list(found)) for path, found in calls.items()}
        for comparer in comparers.values():
            layer = comparer.layer
            hooks.callback(layer.register_forward_pre_hook(comparer.before, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(comparer.after).remove)
        yield comparers


@dataclass
class _Comparer:
    """The hooks at one MoE layer.

    Attributes:
        layer: The layer.
        calls: What is left to compare with.
        found: The differences and their dtypes, of each call.
        plain: Whether the layer gives a tensor and nothing beside it.
    """

    layer: nn.Module
    calls: list[Call]
    found: list[tuple[float, str]] = field(default_factory=list)
    plain: bool = True
    nan: Tensor | None = None
    busy: bool = False

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any] | None:
        """Compare, then take rows that hold NaN around the layer: a router does not choose by NaN."""
        if not self.busy and self.calls:
            self.busy = True
            try:
                self.found.append(self._compare(self.calls.pop(0)))
            finally:
                self.busy = False
        x = _input(args, kwargs)
        self.nan = None if x is None else x.isnan().any(-1, keepdim=True)
        if x is None or self.nan is None or not self.nan.any():
            self.nan = None
            return None
        clean = x.masked_fill(self.nan, 0)
        return ((clean, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): clean})

    def after(self, _: nn.Module, args: object, output: Any) -> Any:
        """Give NaN for the rows that went around."""
        self.plain &= isinstance(output, Tensor)
        nan, self.nan = self.nan, None
        return output.masked_fill(nan, torch.nan) if nan is not None and isinstance(output, Tensor) else None

    def _compare(self, call: Call) -> tuple[float, str]:
        expected, result = call.wide, None
        if expected is not None:
            with _stock_loop(self.layer), _exact_weights(self.layer):
                result = _in_float64(lambda x: _first(_widened(self.layer, x)), [self.layer], call.x)
        if expected is None or result is None:
            expected, result = call.own, _first(self.layer(call.x))
        if result is None or result.shape != expected.shape:
            return float("nan"), name_of(expected.dtype)
        return row_difference(*without_shared_nan(result, expected)), name_of(expected.dtype)


def reports(comparers: Mapping[str, _Comparer]) -> tuple[LayerReport, ...]:
    """Return the worst call of each layer."""
    worst = {path: max(comparer.found, key=lambda found: (found[0] != found[0], found[0]))
             for path, comparer in comparers.items() if comparer.found}  # fmt: skip
    return tuple(LayerReport(path, *found) for path, found in worst.items())


def can_answer(comparers: Mapping[str, _Comparer]) -> bool:
    """Return whether there are layers, and all of them give nothing beside a tensor: then `answering` can replace them."""
    return bool(comparers) and all(comparer.plain and comparer.found for comparer in comparers.values())


@contextmanager
def answering(moe: nn.Module, calls: Calls) -> Iterator[None]:
    """Let the layers of an MoE answer with what the dense FFNs gave, without computing anything."""
    with ExitStack() as stack:
        for path, found in calls.items():
            layer, answers = moe.get_submodule(path), iter(found)
            before = {name: layer.__dict__[name] for name in ("forward",) if name in layer.__dict__}

            def answer(*args: Any, answers: Iterator[Call] = answers, **kwargs: Any) -> Tensor:
                x, call = _input(args, kwargs), next(answers)
                return call.y if x is None else call.y.reshape(x.shape).to(x.device)

            layer.__dict__["forward"] = answer
            stack.callback(layer.__dict__.update, before)
            stack.callback(layer.__dict__.pop, "forward")
        yield


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the activation that a module was called with."""
    return _first((*args, *kwargs.values())[:1])


def _first(output: object) -> Tensor | None:
    """Return a module's output, without what it gives beside it."""
    value = output[0] if isinstance(output, tuple | list) and output else output
    return value if isinstance(value, Tensor) else None


def _last(x: Tensor) -> Tensor:
    """Return the last positions, which are those that token ids and masks are cut to as well."""
    return x[:, -_POSITIONS:].clone() if x.dim() == 3 else x.clone()


def _widened(module: nn.Module, x: Tensor) -> object:
    """Call a module with float64 in the place of its parameters and buffers."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return functional_call(module, {name: t.double() for name, t in tensors if t.is_floating_point()}, (x,))


def _in_float64(run: Callable[[Tensor], Tensor | None], modules: Sequence[nn.Module], x: Tensor) -> Tensor | None:
    """Return what a function of some modules gives for x in float64, or None if they do not compute in it."""
    try:
        y = run(x.double())
    except (RuntimeError, TypeError, ValueError):  # a kernel or a device without it
        return None
    return y if y is not None and y.dtype == torch.float64 else None


@contextmanager
def _stock_loop(layer: nn.Module) -> Iterator[None]:
    """Let experts of transformers run as a loop: its other implementations want 32 bits at most."""
    config: Any = getattr(layer.get_submodule("experts"), "config", None)
    chosen = getattr(config, "_experts_implementation", None)
    if chosen is None or chosen.startswith(OURS):
        yield
        return
    config._experts_implementation = LOOP
    try:
        yield
    finally:
        config._experts_implementation = chosen


@contextmanager
def _exact_weights(layer: nn.Module) -> Iterator[None]:
    """Take the rounding out of the weights of a token's experts: stock routers compute them in float32 whatever comes.

    What they sum to is taken as the number of a few decimals that it is up to this rounding, such as 1.
    """

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if len(args) != 3 or not isinstance(args[2], Tensor) or not args[2].is_floating_point():
            return None
        weights_TK = args[2].double()
        sum_T1 = weights_TK.sum(-1, keepdim=True)
        meant_T1 = sum_T1.round(decimals=_SUM)
        close_T1 = (sum_T1 - meant_T1).abs() <= 1e-6 * meant_T1
        return (*args[:2], torch.where(close_T1, weights_TK * (meant_T1 / sum_T1), weights_TK))

    handle = layer.get_submodule("experts").register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
