"""Which inputs of a graph hold the token ids and the padding mask of an activation: routers and losses look at them."""

from __future__ import annotations

from torch import fx

from moeify.passes.matching import dataflow as flow

# What transformers calls them, by the names that the layers give to them.
_ENCODER = {"token_ids": "input_ids", "mask": "attention_mask"}
_DECODER = {"token_ids": "decoder_input_ids", "mask": "decoder_attention_mask"}


def token_arguments(graph: fx.Graph, activation: fx.Node) -> dict[str, fx.Node]:
    """Return the inputs that describe the tokens of an activation (B, L, H), by what an MoE layer calls them.

    In a decoder beside an encoder those are the decoder's own. Where it makes them from labels, and in a tower that
    reads no tokens, there is nothing to pass on.
    """
    if len(flow.shape(activation)) != 3:
        return {}
    given = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    behind = {node.target for node in flow.ancestors(activation) if node.op == "placeholder"}
    names = _DECODER if behind & {*_DECODER.values(), "labels"} else _ENCODER
    ids = names["token_ids"]
    if ids in given and ids not in behind:
        return {}
    fitting = {own: given[name] for own, name in names.items() if name in given}
    return {own: node for own, node in fitting.items() if len(flow.shape(node)) == 2}
