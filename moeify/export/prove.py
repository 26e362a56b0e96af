"""The proof of an export: ONNX Runtime beside PyTorch, on shapes and routings that the trace never saw.

A decoder is run in pieces, with the keys and values that ONNX Runtime itself gave, and compared with one forward of
the whole sequence without a cache: so a wrong cache, mask or position shows. Where tokens compete for experts, the
pieces decide who wins: there PyTorch is run in the same pieces, with a cache of its own.

Shape legend: B batch, L tokens of the whole sequence.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moeify.errors import VerificationError
from moeify.export.capture import BATCH, DECODER_SEQUENCE, SEQUENCE, Interface, flat_outputs, quiet
from moeify.layers import MoELayer

_DECODER_CASES = ((1, (1, 1, 1), 0), (2, (7, 1, 3), 0), (3, (5, 1, 1), 3))  # batch, pieces, padding of the first row
_PLAIN_CASES = ((1, 1), (1, 9), (3, 5))  # batch, sequence


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
def expected_cases(model: nn.Module, captured: Interface) -> list[Case]:
    """Make the inputs of the proof and run PyTorch on them, as the model is outside the export.

    Args:
        model: In evaluation mode, with its own implementation of attention and experts.
        captured: What is exported.
    """
    generator = torch.Generator().manual_seed(0)
    if captured.cached:
        return [_decoder_case(model, captured, generator, *shape) for shape in _DECODER_CASES]
    return [_plain_case(model, captured, generator, *shape) for shape in _PLAIN_CASES]


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

    def rows(self, output: Tensor) -> Any:
        """Return an index of what counts in an output: all of one that has no row for each token."""
        tokens = self.live is not None and output.dim() > 2 and output.shape[:2] == self.live.shape
        return self.live if tokens else slice(None)


def same_outputs(first: list[Case], second: list[Case]) -> bool:
    """Whether PyTorch gave the same twice, bit for bit or NaN."""
    return all(
        torch.equal(a.outputs[name].nan_to_num(), b.outputs[name].nan_to_num())
        for a, b in zip(first, second, strict=True)
        for name in a.outputs
    )


@contextmanager
def rounded_weights(model: nn.Module, rounded: Mapping[str, Callable[[], Tensor]]) -> Iterator[None]:
    """Inside the block PyTorch computes with rounded weights; a module holds them only while it runs.

    Args:
        model: As it is after the block too.
        rounded: For each parameter, by name, what makes its rounded values.
    """
    handles = []
    for owner, names in _by_owner(rounded).items():
        module = model.get_submodule(owner)
        exact = {name: module.get_parameter(name).data for name in names}

        def swap(module: nn.Module, _: Any, names: Mapping[str, Callable[[], Tensor]] = names) -> None:
            for name, make in names.items():
                module.get_parameter(name).data = make()

        def restore(module: nn.Module, *_: Any, exact: Mapping[str, Tensor] = exact) -> None:
            for name, values in exact.items():
                module.get_parameter(name).data = values

        handles.append(module.register_forward_pre_hook(swap))
        handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_owner(rounded: Mapping[str, Callable[[], Tensor]]) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Group parameters by the module that holds them."""
    owners: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for name, make in rounded.items():
        owner, _, leaf = name.rpartition(".")
        owners.setdefault(owner, {})[leaf] = make
    return owners


def compare(session: Any, captured: Interface, cases: list[Case]) -> Difference:
    """Run an ONNX Runtime session on the cases.

    Args:
        session: An `onnxruntime.InferenceSession` of the exported file.
        captured: What was exported.
        cases: From `expected_cases`.

    Raises:
        VerificationError: the graph does not run.
    """
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    for case in cases:
        try:
            actual = _run_pieces(session, captured, case) if case.pieces else _run(session, case.inputs)
        except Exception as error:  # ONNX Runtime has a class for each of its codes
            first, *_ = str(error).splitlines()
            raise VerificationError(f"ONNX Runtime cannot run the exported graph on {case.label}: {first}") from error
        for name, want in case.outputs.items():
            tallies[name].add(torch.from_numpy(actual[name]).double()[case.rows(want)], want.double()[case.rows(want)])
    outputs = list(tallies.values())
    return Difference(
        max_abs_diff=_worst(tally.difference for tally in outputs),
        relative=_worst(tally.difference / (tally.value or 1.0) for tally in outputs),
        rms=_worst((tally.squared_difference / (tally.squared_value or 1.0)) ** 0.5 for tally in outputs),
        top1_agreement=sum(tally.agreed for tally in outputs) / sum(tally.rows for tally in outputs),
        cases=tuple(case.label for case in cases),
    )


@dataclass
class _Tally:
    """What adds up over the cases, for one output: largest and summed squares of differences and values, top-1."""

    difference: float = 0.0
    value: float = 0.0
    squared_difference: float = 0.0
    squared_value: float = 0.0
    agreed: int = 0
    rows: int = 0

    def add(self, got: Tensor, want: Tensor) -> None:
        if not want.numel():
            return
        difference, same = got - want, got.argmax(-1) == want.argmax(-1)
        self.difference = _worst((self.difference, difference.abs().max().item()))
        self.value = max(self.value, want.abs().max().item())
        self.squared_difference += difference.square().sum().item()
        self.squared_value += want.square().sum().item()
        self.agreed, self.rows = self.agreed + int(same.sum()), self.rows + same.numel()


def _worst(values: Iterable[float]) -> float:
    """The largest, or NaN if there is one."""
    return float(np.max(list(values)))


def _decoder_case(
    model: nn.Module, captured: Interface, generator: torch.Generator, batch: int, pieces: tuple[int, ...], padding: int
) -> Case:
    length = sum(pieces)
    ids_BL = torch.randint(0, captured.vocabulary, (batch, length), generator=generator)
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[0, :padding] = 0
    given = {
        "input_ids": ids_BL,
        "attention_mask": mask_BL,
        "position_ids": (mask_BL.cumsum(-1) - 1).clamp(min=0),
    }
    inputs = {name: given[name] for name in captured.inputs if name in given}
    ends = pieces if _tokens_compete(model) else (length,)
    logits = torch.cat([output.cpu() for output in _forward(model, _on(model, inputs), ends)], dim=1)
    return Case(
        f"{batch} x {'+'.join(map(str, pieces))}{' padded' * bool(padding)}",
        inputs, pieces, mask_BL.bool(), {"logits": logits},
    )  # fmt: skip


def _forward(model: nn.Module, inputs: Mapping[str, Tensor], pieces: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield PyTorch's logits, piece by piece; a single piece needs no cache."""
    untyped: Any = model
    renamed = "cache" in inspect.signature(model.forward).parameters  # as of transformers 5.24
    start, cache = 0, dict[str, Any]()
    for stop in _ends(pieces):
        piece = {n: t[:, :stop] if n == "attention_mask" else t[:, start:stop] for n, t in inputs.items()}
        output = untyped(**piece, **cache, use_cache=len(pieces) > 1)
        cache, start = {"cache" if renamed else "past_key_values": output.past_key_values}, stop
        yield output.logits


def _tokens_compete(model: nn.Module) -> bool:
    """Whether what happens to a token depends on the others of its forward pass, not only through attention."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    return any(layer.eval_capacity_factor is not None or layer.config.router.joint for layer in layers)


def _plain_case(model: nn.Module, captured: Interface, generator: torch.Generator, batch: int, sequence: int) -> Case:
    inputs = {n: _filled(captured, n, batch, sequence, generator) for n in captured.inputs}
    output = flat_outputs(model(**_on(model, inputs), **quiet(model)))
    live = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    return Case(f"{batch} x {sequence}", inputs, (), live, {name: t.cpu() for name, t in output.items()})


def _filled(captured: Interface, name: str, batch: int, sequence: int, generator: torch.Generator) -> Tensor:
    """Random values for an input: token ids, segments, a mask with some padding, or normal numbers."""
    example = captured.inputs[name]
    sizes = {BATCH: batch, SEQUENCE: sequence, DECODER_SEQUENCE: sequence + 2}
    shape = [sizes.get(captured.axes[name].get(axis, ""), size) for axis, size in enumerate(example.shape)]
    if example.is_floating_point():
        return torch.randn(shape, generator=generator).to(example.dtype)
    if example.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool)
    if name.endswith("mask"):
        lengths = torch.randint(1, shape[-1] + 1, (*shape[:-1], 1), generator=generator)
        return (torch.arange(shape[-1]) < lengths).to(example.dtype)
    limit = 2 if name == "token_type_ids" else captured.vocabulary or int(example.max()) + 1
    return torch.randint(0, limit, shape, generator=generator, dtype=example.dtype)


def _on(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _run(session: Any, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    wanted = {argument.name for argument in session.get_inputs()}
    feed = {name: tensor.numpy() for name, tensor in inputs.items() if name in wanted}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, feed), strict=True))


def _run_pieces(session: Any, captured: Interface, case: Case) -> dict[str, np.ndarray]:
    """Feed a sequence piece by piece, each with the keys and values that the one before gave."""
    batch = case.inputs["input_ids"].shape[0]
    state = {
        name: example.new_zeros(batch, example.shape[1], 0, example.shape[3])
        for name, example in captured.inputs.items()
        if name.startswith("past_key_values.")
    }
    logits, start = [], 0
    for stop in _ends(case.pieces):
        piece = {n: t[:, :stop] if n == "attention_mask" else t[:, start:stop] for n, t in case.inputs.items()}
        outputs = _run(session, {**{n: t.contiguous() for n, t in piece.items()}, **state})
        logits.append(outputs["logits"])
        state = {name: torch.from_numpy(outputs[name.replace("past_key_values", "present")]) for name in state}
        start = stop
    return {"logits": np.concatenate(logits, axis=1)}


def _ends(pieces: tuple[int, ...]) -> Iterator[int]:
    end = 0
    for piece in pieces:
        end += piece
        yield end
