"""Passes in a row: which ones turn a dense graph into a sparse one, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import fx

from moeify.errors import MoeifyError
from moeify.passes.base import Pass, PassError, PassResult
from moeify.passes.insert_losses import InsertLosses
from moeify.passes.insert_moe import InsertMoE
from moeify.plan import Plan


def conversion(plan: Plan, *, return_losses: bool = False) -> Pipeline:
    """Return the passes that carry out a plan on a graph that `FindFFN` has searched.

    Args:
        plan: What to replace.
        return_losses: Whether the graph returns the losses beside its result.
    """
    if not return_losses:
        return Pipeline((InsertMoE(plan),))
    given = replace(plan, config=replace(plan.config, attach_losses=False))  # not to be counted twice
    return Pipeline((InsertMoE(given), InsertLosses()))


@dataclass(frozen=True)
class Pipeline(Pass):
    """Run passes in the order that is written. A pipeline is a pass itself.

    Attributes:
        passes: The passes.
        callback: Called after each pass with the pass and its result: to print graphs, to measure.
    """

    passes: tuple[Pass, ...]
    callback: Callable[[Pass, PassResult], None] | None = field(default=None, repr=False, compare=False)

    def run(self, graph_module: fx.GraphModule) -> PassResult:
        """Give each pass the result of the one before.

        Raises:
            MoeifyError: a pass refuses.
            PassError: a pass fails; the message names it and the passes before it.
        """
        modified = False
        for number, each in enumerate(self.passes):
            try:
                result = each(graph_module)
            except MoeifyError:
                raise  # a refusal is written for the user, complete in itself
            except Exception as error:
                before = ", ".join(map(str, self.passes[:number])) or "none"
                raise PassError(f"{each} failed: {error}; passes before it: {before}") from error
            if self.callback is not None:
                self.callback(each, result)
            graph_module, modified = result.graph_module, modified or result.modified
        return PassResult(graph_module, modified)
