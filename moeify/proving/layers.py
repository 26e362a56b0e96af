"""Every MoE layer beside the dense FFN that it replaces, on the input that the FFN gets in the dense model.

So no rounding piles up over depth. Both are computed in float64, whatever the model computes in: a right layer differs
by 1e-15 then, and a wrong one by what is wrong with it. The models are run once each, with hooks at their layers.

Shape legend: B sequences, L positions, H hidden size, K choices per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from moeify.measure import name_of, row_difference, without_shared_nan
from moeify.plan import stored_plan
from moeify.proving.report import LayerReport
from moeify.proving.wide import as_a_loop, exact_weights, first_tensor, in_float64, rounded_to

_POSITIONS = 64  # of each sequence, the last ones: what a layer is computed on

Chains: TypeAlias = Mapping[str, Sequence[str]]
"""The modules of each dense FFN in the order in which they run, by the path of the MoE layer."""


@dataclass(frozen=True)
class Call:
    """One call of a dense FFN.

    Attributes:
        x: Its input, (B, L, H) or any other shape, the last positions.
        wide: What it gives for x in float64; None if it does not run in it.
        narrowed: Whether something in it computes in another dtype all the same.
        y: What it gave, for all positions.
        own: What it gave for x.
        size: How many values its parameters have.
    """

    x: Tensor
    wide: Tensor | None
    narrowed: bool
    y: Tensor
    own: Tensor
    size: int


Calls: TypeAlias = dict[str, list[Call]]


def chains_of(moe: nn.Module) -> Chains:
    """Return the FFNs that the MoE layers of a model stand for: by the plan in its config, else by their own names.

    Args:
        moe: A model whose MoE layers hold a module `experts`, as transformers has them; it may have no weights.
    """
    plan: Any = stored_plan(vars(getattr(moe, "config", object)))
    sites = {} if plan is None else {site["path"]: site for site in plan["sites"]}
    layers = [path for path, module in moe.named_modules() if path and _is_moe(module)]
    in_blocks = {path for path, site in sites.items() if site.get("handing")}  # no modules in a row: the logits tell
    return {path: (*sites.get(path, {}).get("bypassed", ()), path) for path in layers if path not in in_blocks}


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
        x, y = self.x, first_tensor(output)
        if self.busy or x is None or y is None or x.shape != y.shape:
            return  # not an FFN: it has the name of one
        self.busy = True
        try:
            wide, narrowed, chained = _last(x), False, True
            for module in self.chain:
                found, narrow = in_float64(module, wide)
                wide, narrowed, chained = (
                    wide if found is None else found,
                    narrowed or narrow,
                    chained and found is not None,
                )
        finally:
            self.busy = False
        size = sum(parameter.numel() for module in self.chain for parameter in module.parameters())
        # The model may go on to write into y: Falcon adds the attention to it in place.
        self.calls.append(Call(_last(x), wide if chained else None, narrowed, y.clone(), _last(y), size))


@contextmanager
def comparing(moe: nn.Module, calls: Calls) -> Iterator[dict[str, Comparer]]:
    """Compare the layers of an MoE with recorded calls while it runs."""
    with ExitStack() as hooks:
        comparers = {path: Comparer(moe.get_submodule(path), list(found)) for path, found in calls.items()}
        for comparer in comparers.values():
            layer = comparer.layer
            hooks.callback(layer.register_forward_pre_hook(comparer.before, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(comparer.after).remove)
        yield comparers


@dataclass
class Comparer:
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
        expected, result, dtype = call.wide, None, "float64"
        if expected is not None:
            with as_a_loop(self.layer), exact_weights(self.layer) as seen:
                result, _ = in_float64(self.layer, call.x)  # a stock router narrows
            dtype = "float32" if call.narrowed or not seen else rounded_to(self.layer, call.size) or dtype
        if expected is None or result is None:
            expected, result, dtype = call.own, first_tensor(self.layer(call.x)), name_of(call.own.dtype)
        if result is None or result.shape != expected.shape:
            return math.nan, dtype
        return row_difference(*without_shared_nan(result, expected)), dtype


def reports(comparers: Mapping[str, Comparer]) -> tuple[LayerReport, ...]:
    """Return the worst call of each layer."""
    worst = {path: max(comparer.found, key=lambda found: (found[0] != found[0], found[0]))
             for path, comparer in comparers.items() if comparer.found}  # fmt: skip
    return tuple(LayerReport(path, *found) for path, found in worst.items())


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
    return first_tensor((*args, *kwargs.values())[:1])


def _last(x: Tensor) -> Tensor:
    """Return the last positions, which are those that token ids and masks are cut to as well."""
    return x[:, -_POSITIONS:].clone() if x.dim() == 3 else x.clone()
