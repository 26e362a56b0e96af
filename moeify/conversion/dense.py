"""What is learnt of a dense model before it is converted: each thing once, when it is first asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import fx, nn
from transformers import PreTrainedModel

from moeify.arguments import check_model
from moeify.checkpoint.source import Source
from moeify.checkpoint.tensor_info import TensorInfo
from moeify.errors import CheckpointError
from moeify.passes.ffn import Inspection
from moeify.passes.find_ffn import find_ffns_in
from moeify.tracing.given_inputs import check_token_ids
from moeify.tracing.skeleton import StoredNames, build_on_meta, check_shapes, stored_names
from moeify.tracing.trace import Inputs, trace


class Dense:
    """A dense model, its traced graph, and the FFNs that were found in it.

    Args:
        model: Any module; it is neither run nor changed.
        example_inputs: Inputs that the forward accepts; None guesses them for a transformers model.

    Raises:
        MoeifyError: The model cannot be traced; when the graph is first asked for.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, example_inputs: Inputs | None = None) -> None:
        self.model, self.example_inputs = model, example_inputs

    @cached_property
    def graph_module(self) -> fx.GraphModule:
        """The traced graph."""
        return trace(self.model, self.example_inputs)

    @cached_property
    def inspection(self) -> Inspection:
        """The FFNs, and what looks like one and is not."""
        return find_ffns_in(self.graph_module)

    @property
    def regions(self) -> Mapping[tuple[str, ...], fx.GraphModule]:
        """The captured activation of every FFN, by the names of its projections' parameters."""
        return {ffn.projected: ffn.region for ffn in self.inspection.ffns}


class DenseCheckpoint(Dense):
    """A dense checkpoint: its structure without weights, and what `Dense` knows of that.

    Args:
        source: The opened checkpoint.
        example_inputs: Keyword arguments that the forward accepts; None guesses them.

    Raises:
        MoeifyError: Transformers cannot build the model of this `config.json`.
        CheckpointError: No stored tensor is the model's, one does not fit it, or a file beside the weights cannot be
            copied.
        ConfigError: The example inputs hold a token id that the model does not have.
    """

    model: PreTrainedModel
    example_inputs: Mapping[str, Any] | None

    def __init__(self, source: Source, example_inputs: Mapping[str, Any] | None = None) -> None:
        super().__init__(build_on_meta(source.config), example_inputs)
        self.source = source
        source.check_side_files()
        if not (self.names.of or self.names.merged):
            what = type(self.model).__name__
            raise CheckpointError(f"{source.path} holds no tensor of a {what}: its config is that of another model")
        check_shapes(self.model, self.names, source.tensors)
        check_token_ids(self.model, example_inputs or {})

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json` with every default that its class fills in."""
        return dict(self.model.config.to_dict())

    @cached_property
    def names(self) -> StoredNames:
        """How the tensors on disk relate to the model's parameters and buffers."""
        return stored_names(self.model, self.source.tensors)

    def info(self, name: str) -> TensorInfo:
        """Return what is stored of a tensor, by the model's name for it.

        Raises:
            CheckpointError: Nothing is: the config is that of another model, or the checkpoint is not whole.
        """
        return self.source.info(self.names.of.get(name, name))


def find_ffns(model: nn.Module, example_inputs: Inputs | None = None) -> Inspection:
    """Find the dense FFNs of a model, and say of everything that looks like one why it is not (see `Dense`).

    Raises:
        ConfigError: It is no model.
        MoeifyError: The model cannot be traced.
    """
    check_model(model)
    return Dense(model, example_inputs).inspection
