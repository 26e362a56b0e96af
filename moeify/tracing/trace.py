"""A model becomes an FX graph, through torch.export on the meta device: no weight is read, any size takes seconds.

The graph's `get_attr` nodes carry the parameters' own names and every node carries the path of the module that
issued it, which is all that the passes need to know about the model.

What torch.export cannot trace whole is traced by its parts: one untraceable corner, or a tower that the inputs do not
reach, does not lose the model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from moeify.errors import MoeifyError
from moeify.tracing.exporting import Inputs, first_that_traces, to_meta
from moeify.tracing.graphs import Part, name_by_first_path, union
from moeify.tracing.inputs import candidate_inputs, part_inputs
from moeify.tracing.stand_in import RESULTS, standing_in

__all__ = ["UNTRACED", "Inputs", "meta_twin", "trace"]

Result = Callable[[torch.Tensor], object]

UNTRACED = "untraced"
_LIMITS = ("DataDependent", "Unsupported", "DynamicOutputShape", "Data dependent", "data-dependent", "is_meta")


def trace(model: nn.Module, example_inputs: Inputs | None = None) -> fx.GraphModule:
    """Trace `model` in evaluation mode into an ATen-level graph.

    Args:
        model: Any module, on any device; it is neither run nor changed.
        example_inputs: Keyword arguments, positional arguments, or one tensor; only shapes and dtypes matter.
            None guesses them for a transformers model.

    Returns:
        A GraphModule on the meta device whose `get_attr` targets are the model's parameter names. Its
        `meta["untraced"]` says of each module that could not be traced why ("" is the model as a whole: then the
        graph holds its parts beside each other).

    Raises:
        MoeifyError: the inputs cannot be guessed or do not fit, and nothing in the model can be traced without them.
    """
    twin = meta_twin(model).eval()
    _without_caches(twin)
    parts = _Parts()
    try:
        candidates = candidate_inputs(twin) if example_inputs is None else iter([example_inputs])
        graph_module, failure = first_that_traces(twin, candidates)
    except MoeifyError as error:
        graph_module, failure = None, error
    if graph_module is None:
        if example_inputs is not None and not _is_limit(failure):
            raise failure
        parts.failed[""] = str(failure)
        parts.collect_children(twin, "")
        if not parts.found:
            raise failure
        graph_module = union(parts.found, _ties(twin))
    else:
        parts.collect_untouched(twin, "", graph_module)
        if parts.found:
            graph_module = union([("", graph_module), *parts.found], _ties(twin))
    name_by_first_path(graph_module, twin)
    graph_module.meta[UNTRACED] = parts.failed
    return graph_module


def _ties(model: nn.Module) -> dict[str, str]:
    """Return the first name of each parameter that has several, by the others."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def meta_twin(model: nn.Module) -> nn.Module:
    """Copy a module's structure onto the meta device; no weight is read and ties between parameters stay ties."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        for tensor in held:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = to_meta(tensor)
    twin = copy.deepcopy(model, memo)
    for module, copied in zip(model.modules(), twin.modules(), strict=True):
        for name in vars(copied).keys() & copied._modules.keys() - vars(module).keys():
            del vars(copied)[name]  # nn.TransformerDecoderLayer puts F.relu before its activation when it is copied
    return twin


def _without_caches(twin: nn.Module) -> None:
    """Turn caches off: they are outputs that torch.export does not know."""
    for module in twin.modules():
        config = getattr(module, "config", None)
        for holder in (config, *vars(config).values()) if hasattr(config, "__dict__") else ():
            if getattr(holder, "use_cache", False) is True:
                holder.use_cache = False


@dataclass
class _Parts:
    """The parts of a model that trace by themselves, and why the others do not.

    Attributes:
        found: Graphs with their paths.
        failed: Reasons by path, for modules of which no part was traced whole.
        hopeless: Forms (path without numbers, class) that failed before: their siblings fail too.
        results: What stand-ins inside a module of a form may return.
    """

    found: list[Part] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    hopeless: set[tuple[str, type]] = field(default_factory=set)
    results: dict[tuple[str, type], Sequence[Result]] = field(default_factory=dict)

    def collect(self, module: nn.Module, path: str) -> None:
        """Trace a module, or else its parts."""
        if _matrices(module) < 2:
            return  # an FFN has two matrices
        form = _form(module, path)
        if form not in self.hopeless and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            graph_module, failure = first_that_traces(module, part_inputs(module))
            if graph_module is not None:
                self.found.append((path, graph_module))
                self.collect_untouched(module, path, graph_module)
                return
            self.hopeless.add(form)
            self.failed[path] = str(failure)
        before = len(self.found)
        self.collect_children(module, path)
        self.collect_around(module, path, before)

    def collect_around(self, module: nn.Module, path: str, before: int) -> None:
        """Trace a module with stand-ins for its children that do not trace; its parts since `before` lie in it."""
        children = {name: child for name, child in module.named_children() if _matrices(child)}
        opaque = [child for name, child in children.items() if _form(child, _join(path, name)) in self.hopeless]
        form = _form(module, path)
        results = self.results.get(form, RESULTS)
        if not opaque or _matrices(module) - sum(map(_matrices, opaque)) < 2 or isinstance(module, nn.ModuleList):
            return
        self.results[form] = ()
        for result in results:
            with standing_in(opaque, result):
                graph_module, _ = first_that_traces(module, part_inputs(module))
            if graph_module is not None:
                self.results[form] = (result,)
                outside = set(_untouched(module, graph_module))
                self.found[before:] = [part for part in self.found[before:] if _relative(part[0], path) & outside]
                self.found.append((path, graph_module))
                return

    def collect_untouched(self, module: nn.Module, path: str, graph_module: fx.GraphModule) -> None:
        """Trace the modules inside a traced one that its inputs did not reach."""
        for inside in _untouched(module, graph_module):
            self.collect(module.get_submodule(inside), _join(path, inside))

    def collect_children(self, module: nn.Module, path: str) -> None:
        """Trace the modules inside a module that does not trace itself."""
        for name, child in module.named_children():
            if _are_experts(child, module):
                self.failed[_join(path, name)] = "experts of an MoE, and what chooses among them does not trace"
            else:
                self.collect(child, _join(path, name))


def _are_experts(child: nn.Module, around: nn.Module) -> bool:
    """Whether a list holds FFNs and nothing else, as many as a matrix beside it has rows: the router's."""
    if not isinstance(child, nn.ModuleList | nn.ModuleDict) or len({type(one) for one in child.children()}) != 1:
        return False
    inside = {id(parameter) for parameter in child.parameters()}
    tables = {id(table.weight) for table in around.modules() if isinstance(table, nn.Embedding)}
    beside = [p for p in around.parameters() if p.dim() == 2 and id(p) not in inside | tables]
    return all(_matrices(one) in {2, 3} for one in child.children()) and len(child) in {len(p) for p in beside}


def _form(module: nn.Module, path: str) -> tuple[str, type]:
    return re.sub(r"\d+", "#", path), type(module)


def _matrices(module: nn.Module) -> int:
    return sum(p.dim() > 1 for p in module.parameters())


def _relative(path: str, outer: str) -> set[str]:
    """Return the paths of a module and of those around it, as far as they lie in the module at `outer`."""
    inside = path[len(outer) :].lstrip(".").split(".")
    return {".".join(inside[:end]) for end in range(1, len(inside) + 1)}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _untouched(twin: nn.Module, graph_module: fx.GraphModule) -> Iterator[str]:
    """Yield the outermost modules none of whose parameters the graph reads."""
    used = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr") if node.users}
    names: dict[int, list[str]] = {}
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    touched = {""}
    for ties in names.values():
        if used.intersection(ties):
            touched |= {name[:end] for name in ties for end in range(len(name)) if name[end] == "."}
    for path, module in twin.named_modules():
        outer = path.rpartition(".")[0]
        if path not in touched and outer in touched and any(True for _ in module.parameters()):
            yield path


def _is_limit(failure: MoeifyError) -> bool:
    """Whether torch.export gave up on the model's code, as opposed to the forward on its inputs."""
    return any(word in str(failure) for word in _LIMITS)
