"""What a pass is: a frozen dataclass that takes a GraphModule and says what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import fx


@dataclass(frozen=True)
class PassResult:
    """What a pass returns, always.

    Attributes:
        graph_module: The graph after the pass.
        modified: Whether the pass changed anything.
    """

    graph_module: fx.GraphModule
    modified: bool


class Pass(Protocol):
    """A frozen dataclass whose fields are its options; all checks come before the first change to the graph."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite the graph."""
        ...
