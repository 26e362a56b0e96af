"""Drop what nothing reads any more."""

from __future__ import annotations

from torch import fx

from moeify.passes.matching import dataflow as flow


def drop_unused(graph: fx.Graph) -> None:
    """Erase the nodes that only prepare parameters which nothing reads.

    Values that depend on the model's inputs stay, and so does everything that writes in place.
    """
    static: dict[fx.Node, bool] = {}
    for node in reversed(list(graph.nodes)):
        prepares = node.op == "get_attr" or (node.all_input_nodes and not flow.writes(node))
        if prepares and not node.users and node.op != "output" and flow.is_static(node, static):
            graph.erase_node(node)
