"""Tracing of a model into an FX graph, through torch.export on the meta device: no weight is read.

Any size takes seconds. The graph's `get_attr` nodes carry the parameters' own names, and every node carries the path of
the module that issued it. The passes need to know nothing else about the model.

A model that torch.export cannot trace as a whole is traced in parts, so that one module that does not trace, or a tower
that the inputs do not reach, does not lose the model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from moeify.errors import MoeifyError
from moeify.tracing.exporting import Inputs, first_that_traces, to_meta
from moeify.tracing.graphs import TracedPart, join_path, name_by_first_path, union
from moeify.tracing.inputs import candidate_inputs, part_inputs
from moeify.tracing.stand_in import RESULTS, Result, standing_in

__all__ = ["UNTRACED", "Inputs", "meta_twin", "trace"]

Form = tuple[str, type]  # path without numbers, class: equal for the layers of a stack

UNTRACED = "untraced"
_EXPORT_LIMITS = ("DataDependent", "Unsupported", "DynamicOutputShape", "Data dependent", "data-dependent", "is_meta")


def trace(model: nn.Module, example_inputs: Inputs | None = None) -> fx.GraphModule:
    """Trace `model` in evaluation mode into an ATen-level graph.

    Args:
        model: Any module, on any device; it is neither run nor changed.
        example_inputs: Keyword arguments, positional arguments, or one tensor; only shapes and dtypes matter.
            None guesses them for a transformers model.

    Returns:
        A GraphModule on the meta device whose `get_attr` targets are the model's parameter names. Its
        `meta["untraced"]` gives, for each module that could not be traced, the reason by its path ("" is the whole
        model: then the graph holds its parts side by side).

    Raises:
        MoeifyError: The inputs cannot be guessed or do not fit, and nothing in the model can be traced without them.
    """
    twin = meta_twin(model).eval()
    _turn_caches_off(twin)
    parts = _Parts()
    try:
        candidates = candidate_inputs(twin) if example_inputs is None else iter([example_inputs])
        graph_module, failure = first_that_traces(twin, candidates)
    except MoeifyError as error:
        graph_module, failure = None, error
    if graph_module is not None:
        parts.found.append(TracedPart("", graph_module))
        parts.trace_unreached(twin, "", graph_module)
    else:
        if example_inputs is not None and not _is_limit_of_export(failure):
            raise failure
        parts.failed[""] = str(failure)
        parts.trace_children(twin, "")
        if not parts.found:
            raise failure
    if graph_module is None or len(parts.found) > 1:
        graph_module = union(parts.found, _first_names(twin))
    name_by_first_path(graph_module, twin)
    graph_module.meta[UNTRACED] = parts.failed
    return graph_module


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return, for each parameter that has several names, the first of them by the others."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def meta_twin(model: nn.Module) -> nn.Module:
    """Copy a module's structure onto the meta device; no weight is read, and tied parameters stay tied."""
    memo: dict[int, object] = {}
    for module in model.modules():
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        for tensor in held:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
                memo[id(tensor)] = to_meta(tensor)
    twin = copy.deepcopy(model, memo)
    for module, copied in zip(model.modules(), twin.modules(), strict=True):
        for name in vars(copied).keys() & copied._modules.keys() - vars(module).keys():
            del vars(copied)[name]  # nn.TransformerDecoderLayer sets F.relu beside its activation when it is copied
    return twin


def _turn_caches_off(twin: nn.Module) -> None:
    """Set `use_cache` to False everywhere: caches are outputs that torch.export does not know."""
    for module in twin.modules():
        config = getattr(module, "config", None)
        for holder in (config, *vars(config).values()) if hasattr(config, "__dict__") else ():
            if getattr(holder, "use_cache", False) is True:
                holder.use_cache = False


@dataclass
class _Parts:
    """The parts of a model that trace by themselves, and why the others do not.

    Attributes:
        found: The graphs.
        failed: Reasons by path, for modules that were not traced as a whole.
        failed_forms: Forms of which a module failed: the others would fail too.
        results: What stand-ins inside a module of a form may return, where it has been tried.
    """

    found: list[TracedPart] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    failed_forms: set[Form] = field(default_factory=set)
    results: dict[Form, Sequence[Result]] = field(default_factory=dict)

    def trace_module(self, module: nn.Module, path: str) -> None:
        """Trace a module, or else its parts."""
        if _count_matrices(module) < 2:
            return  # an FFN has two matrices
        form = _form(module, path)
        if form not in self.failed_forms and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            graph_module, failure = first_that_traces(module, part_inputs(module))
            if graph_module is not None:
                self.found.append(TracedPart(path, graph_module))
                self.trace_unreached(module, path, graph_module)
                return
            self.failed_forms.add(form)
            self.failed[path] = str(failure)
        before = len(self.found)
        self.trace_children(module, path)
        self.trace_around_failed(module, path, before)

    def trace_around_failed(self, module: nn.Module, path: str, before: int) -> None:
        """Trace a module with stand-ins for its children that do not trace; `found[before:]` are its children's."""
        children = {name: child for name, child in module.named_children() if _count_matrices(child)}
        failed = [child for name, child in children.items() if _form(child, join_path(path, name)) in self.failed_forms]
        rest = _count_matrices(module) - sum(map(_count_matrices, failed))
        if not failed or rest < 2 or isinstance(module, nn.ModuleList):
            return
        form = _form(module, path)
        results = self.results.get(form, RESULTS)
        self.results[form] = ()
        for result in results:
            with standing_in(failed, result):
                graph_module, _ = first_that_traces(module, part_inputs(module))
            if graph_module is not None:
                self.results[form] = (result,)
                unreached = set(_unreached_modules(module, graph_module))
                children_found = [part for part in self.found[before:] if _paths_inside(part.path, path) & unreached]
                self.found[before:] = [*children_found, TracedPart(path, graph_module)]
                return

    def trace_unreached(self, module: nn.Module, path: str, graph_module: fx.GraphModule) -> None:
        """Trace the modules inside a traced one that its inputs did not reach."""
        for inside in _unreached_modules(module, graph_module):
            self.trace_module(module.get_submodule(inside), join_path(path, inside))

    def trace_children(self, module: nn.Module, path: str) -> None:
        """Trace the modules inside a module that does not trace itself."""
        for name, child in module.named_children():
            if _are_experts(child, module):
                self.failed[join_path(path, name)] = "experts of an MoE, and what chooses among them does not trace"
            else:
                self.trace_module(child, join_path(path, name))


def _are_experts(child: nn.Module, around: nn.Module) -> bool:
    """Return whether a list holds nothing but FFNs, as many as a matrix beside it has rows: that of a router."""
    if not isinstance(child, nn.ModuleList | nn.ModuleDict) or len({type(one) for one in child.children()}) != 1:
        return False
    inside = {id(parameter) for parameter in child.parameters()}
    tables = {id(table.weight) for table in around.modules() if isinstance(table, nn.Embedding)}
    beside = [p for p in around.parameters() if p.dim() == 2 and id(p) not in inside | tables]
    return all(_count_matrices(one) in {2, 3} for one in child.children()) and len(child) in {len(p) for p in beside}


def _form(module: nn.Module, path: str) -> Form:
    return re.sub(r"\d+", "#", path), type(module)


def _count_matrices(module: nn.Module) -> int:
    return sum(p.dim() > 1 for p in module.parameters())


def _paths_inside(path: str, outer: str) -> set[str]:
    """Return the paths, within the module at `outer`, of a module in it and of those around that module."""
    inside = path[len(outer) :].lstrip(".").split(".")
    return {".".join(inside[:end]) for end in range(1, len(inside) + 1)}


def _unreached_modules(twin: nn.Module, graph_module: fx.GraphModule) -> Iterator[str]:
    """Yield the outermost modules of which the graph reads no parameter."""
    used = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr") if node.users}
    names: dict[int, list[str]] = {}
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    reached = {""}
    for ties in names.values():
        if used.intersection(ties):
            reached |= {name[:end] for name in ties for end in range(len(name)) if name[end] == "."}
    for path, module in twin.named_modules():
        outer = path.rpartition(".")[0]
        if path not in reached and outer in reached and any(True for _ in module.parameters()):
            yield path


def _is_limit_of_export(failure: MoeifyError) -> bool:
    """Return whether torch.export cannot trace the model's code; else the forward did not accept its inputs."""
    return any(word in str(failure) for word in _EXPORT_LIMITS)
