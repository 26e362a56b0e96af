"""What a pass is: a frozen dataclass that takes a GraphModule and returns one, and leaves the given one as it was."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace

from torch import fx

from moeify.passes.matching import dataflow as flow

FINDINGS = "findings"  # where a graph module's `meta` holds what analyses found, by the name of their class


class PassError(RuntimeError):
    """A pass broke its contract: a bug of the pass, not of whoever ran it."""


@dataclass(frozen=True)
class PassResult:
    """What a pass returns, always: the graph after it (the given one if it changed nothing), and whether it did."""

    graph_module: fx.GraphModule
    modified: bool


@dataclass(frozen=True)
class Pass(ABC):
    """A frozen dataclass whose fields are its options: data, never live modules. To rewrite a graph, see `Rewrite`."""

    def __str__(self) -> str:
        """Return the name alone; `repr` has the options too."""
        return type(self).__name__

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass.

        Raises:
            MoeifyError: the pass refuses this graph.
            PassError: the pass broke its contract.
        """
        self.requires(graph_module)
        result = self.run(graph_module)
        self.ensures(result.graph_module)
        return result

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Raise a MoeifyError for a graph that the pass cannot take: all refusals come from here."""
        del graph_module  # most passes take every graph

    @abstractmethod
    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Do the work; `graph_module` stays as it is."""

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Raise a PassError for a result that does not keep what the pass promises."""
        del graph_module  # a pass that promises nothing has nothing to check


@dataclass(frozen=True)
class Rewrite(Pass):
    """A pass that rewrites a graph, in a copy that shares parameters and layers with the given one.

    The result is checked, and what nothing reads any more is dropped: nodes that only prepare parameters, parameters,
    and the findings of analyses, which hold for the old graph.
    """

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite a copy."""
        draft = copy_graph(graph_module)
        if not self.rewrite(draft):
            return PassResult(graph_module, modified=False)
        _drop_unused(draft.graph)
        try:
            draft.graph.lint()
        except RuntimeError as error:
            raise PassError(f"{self} left a graph that is not well formed: {error}") from error
        draft.meta.pop(FINDINGS, None)
        return PassResult(_holding(draft, draft.graph), modified=True)

    @abstractmethod
    def rewrite(self, draft: fx.GraphModule) -> bool:
        """Change the graph of `draft`, and add submodules to it; return whether anything changed.

        Its parameters, and the layers that it calls, belong to the caller: they must stay as they are.
        """


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a GraphModule with a graph of its own that shares parameters and layers, in the same modes.

    Attributes that no node names are left out. Findings of analyses come along, and refer to the new nodes.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(graph_module.graph, copies))
    graph.set_codegen(graph_module.graph._codegen)
    copied = _holding(graph_module, graph)
    if found := copied.meta.get(FINDINGS):
        copied.meta[FINDINGS] = {name: _about_copies(each, copies) for name, each in found.items()}
    return copied


def _holding(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """Return a GraphModule of what `graph` reads in `root`, in the order of `root`: optimizers count parameters."""
    made = fx.GraphModule(root, graph)
    made.meta = dict(root.meta)
    for path, module in made.named_modules():
        original = root.get_submodule(path)
        if module is not original:
            module.training = original.training
            module._non_persistent_buffers_set = original._non_persistent_buffers_set & module._buffers.keys()
            for kind in ("_modules", "_parameters", "_buffers"):
                _sort(getattr(module, kind), getattr(original, kind))
    return made


def _sort(held: dict[str, object], like: Mapping[str, object]) -> None:
    """Put names into the order that they have in another mapping; those that are not there come last."""
    place = {name: number for number, name in enumerate(like)}
    ordered = sorted(held.items(), key=lambda item: place.get(item[0], len(place)))
    held.clear()
    held.update(ordered)


def _about_copies(value: object, copies: Mapping[fx.Node, fx.Node]) -> object:
    """Return findings with the nodes of a copied graph in place of the original's."""
    if isinstance(value, fx.Node):
        return copies.get(value, value)  # one that was erased since is stale: `findings` refuses it
    if isinstance(value, tuple):
        return tuple(_about_copies(each, copies) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _about_copies(getattr(value, each.name), copies) for each in fields(value)})
    return value


def _drop_unused(graph: fx.Graph) -> None:
    """Erase the nodes that only prepare parameters which nothing reads; what writes in place stays."""
    static: dict[fx.Node, bool] = {}
    for node in reversed(list(graph.nodes)):
        prepares = node.op == "get_attr" or (node.all_input_nodes and not flow.writes(node))
        if prepares and not node.users and node.op != "output" and flow.is_static(node, static):
            graph.erase_node(node)
