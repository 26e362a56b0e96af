"""What a pass is: a frozen dataclass that takes a GraphModule and returns one, and never changes what it was given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar

from torch import fx, nn

from moeify.passes.tidy import drop_unused

FINDINGS = "findings"  # where a graph module's `meta` holds what analyses found, by the name of their class
T = TypeVar("T")


class PassError(RuntimeError):
    """A pass broke its contract: a bug of the pass, not of whoever ran it."""


@dataclass(frozen=True)
class PassResult:
    """What a pass returns, always.

    Attributes:
        graph_module: The graph after the pass. It is the given one where nothing was modified.
        modified: Whether the pass changed anything.
    """

    graph_module: fx.GraphModule
    modified: bool


@dataclass(frozen=True)
class Pass(ABC):
    """A frozen dataclass whose fields are its options: data, never live modules.

    An analysis and a pipeline implement `run`. What rewrites graphs is a `Rewrite`.
    """

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
        """Raise a MoeifyError for a graph that the pass cannot take. All that can be refused is refused here."""
        del graph_module  # most passes take every graph

    @abstractmethod
    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Do the work; `graph_module` stays as it is."""

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Raise a PassError for a result that does not keep what the pass promises."""
        del graph_module  # a pass that promises nothing has nothing to check


@dataclass(frozen=True)
class Rewrite(Pass):
    """A pass that rewrites a graph: it implements `rewrite`, and is handed a copy.

    After it the graph is checked, attributes that no node reads are dropped, and so are the findings of analyses, which
    hold for the old graph.
    """

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite a copy of the graph, which shares its parameters and layers."""
        draft = copy_graph(graph_module)
        if not self.rewrite(draft):
            return PassResult(graph_module, modified=False)
        drop_unused(draft.graph)
        try:
            draft.graph.lint()
        except RuntimeError as error:
            raise PassError(f"{self} left a graph that is not well formed: {error}") from error
        draft.meta.pop(FINDINGS, None)
        return PassResult(_holding(draft, draft.graph), modified=True)

    @abstractmethod
    def rewrite(self, draft: fx.GraphModule) -> bool:
        """Change the graph of `draft` and return whether anything changed.

        Submodules may be added to it. Its parameters and the layers that it calls are the caller's: they stay as they
        are.
        """


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a GraphModule with a graph of its own that shares parameters and layers, in the same modes.

    Attributes that no node reads are left out. Findings of analyses come along, and refer to the new nodes.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(graph_module.graph, copies))
    graph.set_codegen(graph_module.graph._codegen)
    copied = _holding(graph_module, graph)
    if FINDINGS in copied.meta:
        copied.meta[FINDINGS] = {name: _moved(found, copies) for name, found in copied.meta[FINDINGS].items()}
    return copied


def _holding(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Return a GraphModule of what `graph` reads in `root`."""
    made = fx.GraphModule(root, graph)
    made.meta = dict(getattr(root, "meta", {}))
    for path, module in made.named_modules():
        original = root.get_submodule(path)
        if module is not original:
            module.training = original.training
            module._non_persistent_buffers_set = original._non_persistent_buffers_set & module._buffers.keys()
    return made


def _moved(value: T, copies: Mapping[fx.Node, fx.Node]) -> T:
    """Return findings with the nodes of a copied graph in place of the original's."""
    moved: object = value
    if isinstance(value, fx.Node):
        moved = copies.get(value, value)  # one that was erased since is stale: `findings` refuses it
    elif isinstance(value, tuple):
        moved = tuple(_moved(each, copies) for each in value)
    elif is_dataclass(value) and not isinstance(value, type):
        moved = replace(value, **{each.name: _moved(getattr(value, each.name), copies) for each in fields(value)})
    return moved  # type: ignore[return-value]
