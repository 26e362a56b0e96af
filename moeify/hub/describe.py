"""What is in a checkpoint of any format: dense, a native MoE, or converted to moeify's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeify.checkpoint.source import Source
from moeify.config import MoEConfig
from moeify.contract.found import find_layers
from moeify.conversion.cost import model_cost
from moeify.conversion.dense import DenseCheckpoint
from moeify.conversion.summary import Summary, summarize
from moeify.hub.loading import load_structure
from moeify.hub.registration import register
from moeify.plan import stored_plan


def describe(source: Source, config: MoEConfig, example_inputs: Mapping[str, Any] | None = None) -> Summary:
    """Look at a checkpoint; no weight is read.

    Args:
        source: The opened checkpoint.
        config: The conversion whose cost is counted, where there is something to convert.
        example_inputs: Keyword arguments that the forward accepts; None guesses them.

    Raises:
        MoeifyError: Its model cannot be built, or a dense one not be traced.
    """
    if stored_plan(source.config) is None:
        return summarize(DenseCheckpoint(source, example_inputs), config)
    register()
    model = load_structure(source)
    layers = find_layers(model)
    cost = model_cost(model, layers, source.nbytes)
    obstacle = "it is converted already: start from the dense checkpoint"
    return Summary(str(source.model_type), model, cost, layers, obstacle=obstacle)
