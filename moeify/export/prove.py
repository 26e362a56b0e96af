"""The proof of an export: ONNX Runtime beside PyTorch, on shapes and routings that the trace never saw.

A decoder is run in pieces, with the keys and values that ONNX Runtime itself gave, and compared with one forward of
the whole sequence without a cache: so a wrong cache, mask or position shows. Where tokens compete for experts, the
pieces decide who wins: there PyTorch is run in the same pieces, with a cache of its own.

Shape legend: B batch, L tokens of the whole sequence.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from moeify.errors import VerificationError
from moeify.export.capture.interface import PRESENT, STATE, Interface, device_of, flat_outputs, without_cache
from moeify.export.lower.weights import Rounded
from moeify.layers import moe_layers
from moeify.measure import fill, relative_difference

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_DECODER_CASES = ((1, (1, 1, 1), 0), (2, (7, 1, 3), 0), (3, (5, 1, 1), 3))  # batch, pieces, padding of the first row
_PLAIN_CASES = ((1, 1), (1, 9), (3, 5))  # batch, sequence

Pair = tuple[Tensor, Tensor]  # what ONNX Runtime gave, and what PyTorch gave


@dataclass(frozen=True)
class Case:
    """One run of the proof.

    Attributes:
        label: Its shapes, for people.
        inputs: Whole inputs by name, without keys and values.
        pieces: How many tokens go in at a time; empty for a single run.
        live: Which tokens count, or None for all: what attends to padding alone has no defined value.
        outputs: What PyTorch gives, by name of output.
    """

    label: str
    inputs: Mapping[str, Tensor]
    pieces: tuple[int, ...]
    live: Tensor | None
    outputs: Mapping[str, Tensor]

    def rows(self, output: Tensor) -> Tensor:
        """Return what counts of an output, in float64: all of one that has no row for each token."""
        tokens = self.live is not None and output.dim() > 2 and output.shape[:2] == self.live.shape
        return (output[self.live] if tokens else output).double()


@dataclass(frozen=True)
class Difference:
    """What was measured; of several outputs the worst.

    Attributes:
        max_abs_diff: Largest absolute difference.
        relative: Largest absolute difference in an output by its largest absolute value.
        rms: Root mean square of the differences in an output by that of its values.
        top1_agreement: Share of rows whose largest value is at the same place.
        cases: The shapes that were run.
    """

    max_abs_diff: float
    relative: float
    rms: float
    top1_agreement: float
    cases: tuple[str, ...]


@torch.no_grad()
def expected_cases(model: nn.Module, interface: Interface) -> list[Case]:
    """Make the inputs of the proof and run PyTorch on them, as the model is outside the export.

    Args:
        model: In evaluation mode, with its own implementation of attention and experts.
        interface: What is exported.
    """
    generator = torch.Generator().manual_seed(0)
    if interface.states:
        return [_decoder_case(model, interface, generator, *shape) for shape in _DECODER_CASES]
    return [_plain_case(model, interface, generator, *shape) for shape in _PLAIN_CASES]


def _decoder_case(
    model: nn.Module, interface: Interface, generator: torch.Generator, batch: int, pieces: tuple[int, ...],
    padding: int,
) -> Case:  # fmt: skip
    length = sum(pieces)
    ids_BL = torch.randint(0, interface.vocab_size, (batch, length), generator=generator)
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[0, :padding] = 0
    positions_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": ids_BL, "attention_mask": mask_BL, "position_ids": positions_BL}
    inputs = {name: given[name] for name in interface.inputs if name in given}
    seen = pieces if _tokens_compete(model) else (length,)
    logits = torch.cat([output.cpu() for output in _forward(model, _on(model, inputs), seen)], dim=1)
    label = f"{batch} x {'+'.join(map(str, pieces))}{' padded' * bool(padding)}"
    return Case(label, inputs, pieces, mask_BL.bool(), {"logits": logits})


def _forward(model: nn.Module, inputs: Mapping[str, Tensor], pieces: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield PyTorch's logits, piece by piece; a single piece needs no cache."""
    renamed = "cache" in inspect.signature(model.forward).parameters  # as of transformers 5.24
    cache: dict[str, object] = {}
    for piece in _pieces(inputs, pieces):
        output = model(**piece, **cache, use_cache=len(pieces) > 1)
        cache = {"cache" if renamed else "past_key_values": output.past_key_values}
        yield output.logits


def _tokens_compete(model: nn.Module) -> bool:
    """Whether what happens to a token depends on the others of its forward pass, not only through attention."""
    layers = list(moe_layers(model).values())
    return any(layer.eval_capacity_factor is not None or layer.config.router.joint for layer in layers)


def _plain_case(model: nn.Module, interface: Interface, generator: torch.Generator, batch: int, sequence: int) -> Case:
    inputs = {}
    for name, example in interface.sized(batch, sequence).items():
        ids = 1 if example.is_floating_point() else interface.vocab_size or int(interface.inputs[name].max()) + 1
        inputs[name] = fill(example, generator, name=name, ids=range(ids))
    output = flat_outputs(model(**_on(model, inputs), **without_cache(model)))
    live = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    return Case(f"{batch} x {sequence}", inputs, (), live, {name: t.cpu() for name, t in output.items()})


def _on(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = device_of(model)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def same_outputs(first: list[Case], second: list[Case]) -> bool:
    """Whether PyTorch gave the same twice, bit for bit or NaN."""
    return all(
        torch.equal(a.outputs[name].nan_to_num(), b.outputs[name].nan_to_num())
        for a, b in zip(first, second, strict=True)
        for name in a.outputs
    )


@contextmanager
def rounded_weights(model: nn.Module, rounded: Rounded) -> Iterator[None]:
    """Let PyTorch compute with rounded weights inside the block; a module holds them only while it runs.

    Args:
        model: It has its own weights after the block, whatever happens inside.
        rounded: For each parameter, by name, what makes its rounded values.
    """
    with ExitStack() as at_the_end:
        for name, make in rounded.items():
            owner, _, leaf = name.rpartition(".")
            module, exact = model.get_submodule(owner), model.get_parameter(name).data
            restore = partial(_put, leaf, exact.detach)
            at_the_end.callback(restore, module)
            at_the_end.callback(module.register_forward_pre_hook(partial(_put, leaf, make)).remove)
            at_the_end.callback(module.register_forward_hook(restore).remove)
        yield


def _put(name: str, make: Callable[[], Tensor], module: nn.Module, *_: object) -> None:
    module.get_parameter(name).data = make()


def compare(session: InferenceSession, interface: Interface, cases: list[Case]) -> Difference:
    """Run an ONNX Runtime session on the cases.

    Raises:
        VerificationError: the graph does not run.
    """
    found: dict[str, list[Pair]] = defaultdict(list)
    for case in cases:
        try:
            actual = _run_pieces(session, interface, case) if case.pieces else _run(session, case.inputs)
        except Exception as error:  # ONNX Runtime has a class for each of its codes
            first, *_ = str(error).splitlines()
            raise VerificationError(f"ONNX Runtime cannot run the exported graph on {case.label}: {first}") from error
        for name, want in case.outputs.items():
            got = torch.from_numpy(actual[name])
            if got.shape != want.shape:
                shapes = f"{tuple(got.shape)}, and PyTorch of {tuple(want.shape)}"
                raise VerificationError(f"the exported graph gives {name} of shape {shapes}, on {case.label}")
            if want.numel():
                found[name].append((case.rows(got), case.rows(want)))
    outputs = [_joined(pairs) for pairs in found.values()]
    same = [(got.argmax(-1) == want.argmax(-1)).flatten() for pairs in found.values() for got, want in pairs]
    return Difference(
        max_abs_diff=_worst([(got - want).abs().max().item() for got, want in outputs]),
        relative=_worst([relative_difference(got, want) for got, want in outputs]),
        rms=_worst([_rms(got - want) / (_rms(want) or 1.0) for got, want in outputs]),
        top1_agreement=torch.cat(same).double().mean().item(),
        cases=tuple(case.label for case in cases),
    )


def _joined(pairs: list[Pair]) -> Pair:
    """Join the values of all cases."""
    got, want = (torch.cat([values.flatten() for values in side]) for side in zip(*pairs, strict=True))
    return got, want


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _worst(values: list[float]) -> float:
    """The largest, or NaN if there is one."""
    return float(np.max(values))


def _run(session: InferenceSession, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    wanted = {argument.name for argument in session.get_inputs()}
    feed = {name: tensor.numpy() for name, tensor in inputs.items() if name in wanted}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def _run_pieces(session: InferenceSession, interface: Interface, case: Case) -> dict[str, np.ndarray]:
    """Feed a sequence piece by piece, each with the keys and values that the one before gave."""
    batch = case.inputs["input_ids"].shape[0]
    states = {n: t.new_zeros(batch, t.shape[1], 0, t.shape[3]) for n, t in interface.states.items()}
    logits = []
    for piece in _pieces(case.inputs, case.pieces):
        outputs = _run(session, {**{n: t.contiguous() for n, t in piece.items()}, **states})
        logits.append(outputs["logits"])
        states = {name: torch.from_numpy(outputs[name.replace(STATE, PRESENT)]) for name in states}
    return {"logits": np.concatenate(logits, axis=1)}


def _pieces(inputs: Mapping[str, Tensor], pieces: tuple[int, ...]) -> Iterator[dict[str, Tensor]]:
    """Yield the tokens of each piece, with the mask of everything so far."""
    for start, stop in pairwise(accumulate(pieces, initial=0)):
        yield {n: t[:, :stop] if n == "attention_mask" else t[:, start:stop] for n, t in inputs.items()}
