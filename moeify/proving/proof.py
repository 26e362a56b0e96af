"""The proof of a conversion: the dense model and the MoE run on the same inputs, and their logits are compared.

`verify` compares two models, `verify_checkpoints` two checkpoints, and `verify_slice` the first layers of two
checkpoints, so that the memory does not grow with the depth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from moeify.checkpoint.source import open_source
from moeify.checkpoint.tensor_info import torch_dtype
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import PLAN_FILE
from moeify.conversion.dense import DenseCheckpoint
from moeify.errors import VerificationError
from moeify.files.json_text import read_json_object
from moeify.files.limits import PLAN_BYTES
from moeify.files.reading import is_file
from moeify.hub.loading import FirstLayers, load, load_first_layers
from moeify.measure import fill_inputs, relative_difference, tolerance_of, top1_agreement
from moeify.plan import Plan
from moeify.pretrained import load_tokenizer
from moeify.tracing.inputs import candidate_inputs

_CONVERTED_LAYERS = 2  # in the slice that is compared
_MAX_TOKENS = 512  # of a text
_NUMBERED = re.compile(r"(?P<stack>(?:[^.]+\.)*?)(?P<number>\d+)\.")
_PLAIN = {"experts_implementation": "eager"}  # transformers' default needs widths of whole 16 bytes


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
    """

    max_abs_diff: float
    max_abs_logit: float
    relative: float
    top1_agreement: float
    tolerance: float | None
    passed: bool

    def to_dict(self) -> dict[str, float | None]:
        """Return the fields as plain data."""
        return asdict(self)

    def summary(self) -> str:
        """Return one line for people."""
        promise = "no exactness promised" if self.tolerance is None else f"tolerance {self.tolerance:.0e}"
        return (
            f"relative difference {self.relative:.2e} ({promise}), largest {self.max_abs_diff:.2e} "
            f"of {self.max_abs_logit:.3g}, top-1 agreement {self.top1_agreement:.2%}"
        )


@torch.no_grad()
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
    """
    arguments = _random_inputs(dense) if inputs is None else inputs
    expected, result = (_logits(_evaluate(model, arguments)) for model in (dense, moe))
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
    )


def verify_checkpoints(dense: Path, moe: Path, *, text: str | None = None) -> VerifyReport:
    """Load both checkpoints as a whole, in float32, and compare their logits.

    If the conversion was told to store another dtype, the dense weights are rounded to it first: the proof is about the
    conversion, not about the rounding that was asked for.

    Args:
        dense: A folder or GGUF file.
        moe: A folder.
        text: Text to run them on, through the tokenizer beside the MoE; None takes random token ids.

    Raises:
        CheckpointError: A tensor of either is missing or unexpected.
    """
    dense_model, moe_model = load(dense, dtype=torch.float32), load(moe, dtype=torch.float32, **_PLAIN)
    plan_file = moe / PLAN_FILE
    record = read_json_object(plan_file, PLAN_BYTES) if is_file(plan_file) else {}
    _round_weights(dense_model, record.get("cast_to"))
    exact = MoEConfig.from_dict(record["config"]).exact if record else True  # others' MoEs are held to equality
    return verify(dense_model, moe_model, None if text is None else _tokens(moe, text), exact=exact)


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
        moe_model = load_first_layers(converted, after, **_PLAIN)
    _round_weights(dense_model, cast_to)
    return verify(dense_model, moe_model, _random_inputs(dense_model, dense.example_inputs), exact=plan.config.exact)


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


def _tokens(folder: Path, text: str) -> dict[str, Tensor]:
    ids = load_tokenizer(folder)(text, return_tensors="pt")["input_ids"]
    return {"input_ids": ids[:, :_MAX_TOKENS]}


@torch.no_grad()
def _round_weights(model: nn.Module, dtype: str | None) -> None:
    """Give every weight the value that it has in a narrower dtype; None leaves them as they are."""
    if dtype is None:
        return
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(torch_dtype(dtype)))


def _random_inputs(model: nn.Module, examples: Mapping[str, object] | None = None) -> dict[str, object]:
    """Return inputs for a transformers model; `examples` on the meta device are filled, None guesses their shapes."""
    config = getattr(model, "config", None)
    vocab_size = getattr(config and config.get_text_config(), "vocab_size", None) or 2
    examples = next(candidate_inputs(model)) if examples is None else examples
    return fill_inputs(examples, torch.Generator().manual_seed(0), range(vocab_size))


def _evaluate(model: nn.Module, arguments: Mapping[str, object]) -> object:
    training = model.training
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # some models draw even in evaluation (ViT-MAE masks patches): both draw the same
            return model.eval()(**arguments)
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
