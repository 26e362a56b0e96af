"""The proof of a conversion: every MoE layer is held to its dense FFN on equal inputs, and the logits are compared.

`verify` compares two models, and `verify_slice` the first layers of two checkpoints, so that the memory does not grow
with the depth.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify.arguments import check_model
from moeify.checkpoint.source import Source, open_source
from moeify.checkpoint.tensor_info import torch_dtype
from moeify.conversion.dense import DenseCheckpoint
from moeify.errors import VerificationError, told_as
from moeify.hub.loading import FirstLayers, load_first_layers
from moeify.measure import fill_inputs, relative_difference, without_shared_nan
from moeify.plan import Plan
from moeify.proving.layers import Calls, Comparer, answering, chains_of, comparing, recording, reports
from moeify.proving.report import VerifyReport, compare
from moeify.tracing.inputs import candidate_inputs

_DOES_NOT_RUN = "the {} does not run on the inputs of the proof"
_CONVERTED_LAYERS = 2  # in the slice that is compared
_NUMBERED = re.compile(r"(?P<stack>(?:[^.]+\.)*?)(?P<number>\d+)\.")


def verify(
    dense: nn.Module, moe: nn.Module, inputs: Mapping[str, object] | None = None, *, exact: bool = True
) -> VerifyReport:
    """Run both models on the same inputs: compare every MoE layer with its dense FFN on equal inputs, and the logits.

    Without logits, the first output is compared; without an MoE layer in a dense FFN's place, the logits alone.

    Args:
        dense: The model before the conversion.
        moe: The model after it, in the same dtype.
        inputs: Keyword arguments of both forwards; None makes random ones for a transformers model.
        exact: Whether the method promises equality.

    Raises:
        VerificationError: One of them does not run on the inputs, or the outputs have different shapes.
        ConfigError: One of them is no model.
    """
    check_model(dense, "dense")
    check_model(moe, "moe")
    arguments = random_inputs(dense) if inputs is None else inputs
    with recording(dense, chains_of(moe)) as calls, told_as(_DOES_NOT_RUN.format("dense model"), VerificationError):
        expected = run(dense, arguments)
    with comparing(moe, calls) as comparers, told_as(_DOES_NOT_RUN.format("MoE"), VerificationError):
        result = run(moe, arguments)
    outside = difference_outside(moe, comparers, calls, arguments, expected)
    return compare(expected, result, exact=exact, layers=reports(comparers), outside=outside)


def difference_outside(
    moe: nn.Module,
    comparers: Mapping[str, Comparer],
    calls: Calls,
    arguments: Mapping[str, object],
    expected: Tensor,
) -> float | None:
    """Return the relative difference of the logits of an MoE whose layers answer what the dense FFNs gave.

    Args:
        moe: The MoE.
        comparers: What `comparing` found in its layers.
        calls: What the dense FFNs gave.
        arguments: Of the forward.
        expected: What the dense model gives.

    Returns:
        None if there are no such layers, or one of them gives more than a tensor.
    """
    if not comparers or not all(comparer.plain and comparer.found for comparer in comparers.values()):
        return None
    with answering(moe, calls):
        result = run(moe, arguments)
    if result.shape != expected.shape:
        return None  # `compare` says so
    return relative_difference(*without_shared_nan(result, expected))


def plainly(moe: Source) -> dict[str, Any]:
    """Return how to load an MoE so that its experts run with any width: transformers' default wants whole 16 bytes."""
    return {} if "experts_implementation" in moe.config else {"experts_implementation": "eager"}


def verify_slice(dense: DenseCheckpoint, moe: Path, plan: Plan, *, cast_to: str | None = None) -> VerifyReport:
    """Compare a dense checkpoint and its MoE up to the second converted layer, in float32.

    Models that are not one stack of numbered layers are compared as a whole.

    Args:
        dense: The dense checkpoint.
        moe: The folder that was written.
        plan: What was converted.
        cast_to: safetensors name of the dtype that the output was told to store, if any.

    Raises:
        CheckpointError: A tensor of either is missing or unexpected.
    """
    after = _first_layers(dense, plan)
    before = None if after is None else replace(after, stack=_stack_on_disk(dense, plan))
    with open_source(moe) as converted:
        dense_model = load_first_layers(dense.source, before, unused=True)  # as they were left out of the MoE
        moe_model = load_first_layers(converted, after, beside=dense_model, **plainly(converted))
    round_weights(dense_model, cast_to)
    return verify(dense_model, moe_model, random_inputs(dense_model, dense.example_inputs), exact=plan.config.exact)


def _first_layers(dense: DenseCheckpoint, plan: Plan) -> FirstLayers | None:
    """Return the layers up to the second converted one; None if the converted FFNs are not in one numbered stack."""
    numbered = [found for site in plan.sites if (found := _NUMBERED.match(site.path))]
    stacks = {found["stack"] for found in numbered}
    counted = hasattr(dense.model.config, "num_hidden_layers")
    if len(numbered) < len(plan.sites) or len(stacks) > 1 or not counted:
        return None
    numbers = sorted(int(found["number"]) for found in numbered)
    return FirstLayers(stacks.pop(), numbers[:_CONVERTED_LAYERS][-1] + 1)


def _stack_on_disk(dense: DenseCheckpoint, plan: Plan) -> str:
    """Return how the first converted layer's tensors begin in the dense checkpoint, whose names may be older."""
    found = _NUMBERED.match(dense.names.of[plan.sites[0].down.parameter])
    return found["stack"] if found else ""


@torch.no_grad()
def round_weights(model: nn.Module, dtype: str | None) -> None:
    """Give every weight the value that it has in a narrower dtype; None leaves them as they are."""
    if dtype is None:
        return
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(torch_dtype(dtype)))


def random_inputs(model: nn.Module, examples: Mapping[str, object] | None = None) -> dict[str, object]:
    """Return inputs for a transformers model, special tokens first where they are random token ids.

    Args:
        model: The model.
        examples: Those on the meta device are filled; None guesses their shapes.
    """
    config = getattr(model, "config", None)
    text_config = config and config.get_text_config()
    vocab_size = getattr(text_config, "vocab_size", None) or 2
    examples = next(candidate_inputs(model)) if examples is None else examples
    filled = fill_inputs(examples, torch.Generator().manual_seed(0), range(vocab_size))
    special = torch.tensor([token for token in _special_tokens(text_config) if token < vocab_size], dtype=torch.long)
    for name, example in examples.items():
        ids = filled[name]
        if name.endswith("input_ids") and isinstance(example, Tensor) and example.is_meta and isinstance(ids, Tensor):
            ids[..., : len(special)] = special[: ids.shape[-1]]
    if "SequenceClassification" in type(model).__name__ and getattr(text_config, "pad_token_id", None) is None:
        return {name: value[:1] if isinstance(value, Tensor) else value for name, value in filled.items()}
    return filled  # a classifier looks for the end of each text, and without padding it takes one text at a time


def _special_tokens(config: object) -> list[int]:
    """Return the ids of the tokens that begin, end and fill up a text, as a config names them."""
    named = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    ids = [token for value in named for token in (value if isinstance(value, list) else [value])]
    return [token for token in dict.fromkeys(ids) if isinstance(token, int) and token >= 0]


@torch.no_grad()
def run(model: nn.Module, arguments: Mapping[str, object]) -> Tensor:
    """Return a model's logits, or its first output if it has no head, in evaluation mode.

    Raises:
        VerificationError: There is no floating-point tensor in what it gives.
    """
    training = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # some models draw even in evaluation (ViT-MAE masks patches): both draw the same
            return _logits(model.eval()(**arguments))
    finally:
        model.train(training)


def _logits(output: object) -> Tensor:
    """Return the logits of a transformers output, or the first floating-point tensor of anything else."""
    named = getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    values = list(output.values()) if isinstance(output, Mapping) else output
    for value in values if isinstance(values, tuple | list) else [values]:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise VerificationError(f"{type(output).__name__} holds no floating-point tensor to compare")
