"""The proof of a conversion: the dense model and the MoE run on the same inputs, and their logits are compared.

`verify` compares two models, and `verify_slice` the first layers of two checkpoints, so that the memory does not grow
with the depth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from moeify.arguments import check_model
from moeify.checkpoint.source import Source, open_source
from moeify.checkpoint.tensor_info import torch_dtype
from moeify.conversion.dense import DenseCheckpoint
from moeify.errors import VerificationError
from moeify.hub.loading import FirstLayers, load_first_layers
from moeify.measure import fill_inputs, relative_difference, tolerance_of, top1_agreement
from moeify.plan import Plan
from moeify.tracing.inputs import candidate_inputs

_CONVERTED_LAYERS = 2  # in the slice that is compared
_NUMBERED = re.compile(r"(?P<stack>(?:[^.]+\.)*?)(?P<number>\d+)\.")


@dataclass(frozen=True)
class VerifyReport:
    """What was measured.

    Attributes:
        max_abs_diff: Largest absolute difference between two logits.
        max_abs_logit: Largest absolute logit of the dense model.
        relative: Their ratio.
        top1_agreement: Share of positions at which both models rank the same logit first.
        tolerance: Largest relative difference that passes; None if the method promises none.
        passed: Whether the promise holds.
        unused: Names of the dense checkpoint's tensors that its model has no place for, which were left out.
    """

    max_abs_diff: float
    max_abs_logit: float
    relative: float
    top1_agreement: float
    tolerance: float | None
    passed: bool
    unused: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain data."""
        return asdict(self)

    def summary(self) -> str:
        """Return one line for people."""
        promise = "no exactness promised" if self.tolerance is None else f"tolerance {self.tolerance:.0e}"
        return (
            f"relative difference {self.relative:.2e} ({promise}), largest {self.max_abs_diff:.2e} "
            f"of {self.max_abs_logit:.3g}, top-1 agreement {self.top1_agreement:.2%}"
        )


def verify(
    dense: nn.Module, moe: nn.Module, inputs: Mapping[str, object] | None = None, *, exact: bool = True
) -> VerifyReport:
    """Run both models on the same inputs and compare their logits, or their first output if they have no head.

    Args:
        dense: The model before the conversion.
        moe: The model after it, in the same dtype; the tolerance is that of the dtype.
        inputs: Keyword arguments of both forwards; None makes random ones for a transformers model.
        exact: Whether the method promises equality.

    Raises:
        VerificationError: The outputs have different shapes.
        ConfigError: One of them is no model.
    """
    check_model(dense, "dense")
    check_model(moe, "moe")
    arguments = random_inputs(dense) if inputs is None else inputs
    return compare(*(run(model, arguments) for model in (dense, moe)), exact=exact)


def compare(expected: Tensor, result: Tensor, *, exact: bool, unused: tuple[str, ...] = ()) -> VerifyReport:
    """Compare the logits of a dense model and of its MoE.

    Args:
        expected: What the dense model gives.
        result: What the MoE gives, in the same dtype.
        exact: Whether the method promises equality.
        unused: For the report.

    Raises:
        VerificationError: They have different shapes.
    """
    if expected.shape != result.shape:
        raise VerificationError(f"the dense model gives {tuple(expected.shape)}, the MoE {tuple(result.shape)}")
    tolerance = tolerance_of(expected.dtype) if exact else None
    relative = relative_difference(result, expected)
    return VerifyReport(
        max_abs_diff=(result.double() - expected.double()).abs().max().item(),
        max_abs_logit=expected.double().abs().max().item(),
        relative=relative,
        top1_agreement=top1_agreement(result, expected),
        tolerance=tolerance,
        passed=math.isfinite(relative) and (tolerance is None or relative <= tolerance),
        unused=unused,
    )


def plainly(moe: Source) -> dict[str, str]:
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
        dense_model = load_first_layers(dense.source, before)
        moe_model = load_first_layers(converted, after, **plainly(converted))
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
    """Return inputs for a transformers model; `examples` on the meta device are filled, None guesses their shapes."""
    config = getattr(model, "config", None)
    vocab_size = getattr(config and config.get_text_config(), "vocab_size", None) or 2
    examples = next(candidate_inputs(model)) if examples is None else examples
    return fill_inputs(examples, torch.Generator().manual_seed(0), range(vocab_size))


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
