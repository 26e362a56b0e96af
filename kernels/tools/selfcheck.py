"""Every kernel against the reference, on this machine's hardware. A machine without a GPU cannot prove this.

Shape legend as in `moeify.kernels.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeify.kernels.inputs import ExpertInputs
from moeify.kernels.layout import routing_layout
from moeify.kernels.ops import experts, grouped_linear
from moeify.kernels.reference import to_blocks, to_dense
from moeify.kernels.topology import block_topology

Difference = Callable[[Tensor, Tensor], float]
FIELDS = ("x_TH", "weights_TK", "up_EJH", "down_EHI", "up_bias_EJ", "down_bias_EH")  # those that have a gradient


@dataclass(frozen=True)
class Case:
    """The experts of one check. Ids are drawn from [-1, experts], so that some are outside [0, experts)."""

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    activation: str = "silu"
    gated: bool = True

    def __str__(self) -> str:
        """Name the case in reports."""
        sizes = (self.tokens, self.top_k, self.experts, self.hidden, self.intermediate)
        return f"{'x'.join(map(str, sizes))} {self.activation}{'' if self.gated else ', no gate'}"


CASES = (
    Case(1, 8, 32, 256, 128),  # a decoding step: tiles of 16 rows
    Case(77, 3, 10, 72, 40),  # tiles of 32 rows, no width a multiple of a tile
    Case(512, 2, 8, 256, 128),  # tiles of 64 rows, every width a multiple of a tile
    Case(520, 2, 2, 136, 264),  # tiles of 128 rows
)


# Which kernel writes what, in the order of a training step: what comes later is made of what came before.
_WRITTEN_BY = (
    ("output", "up or rows"),
    ("gradient of weights_TK", "down_backward"),
    ("gradient of x_TH", "rows"),
    ("gradient of up_EJH", "weights"),
    ("gradient of down_EHI", "weights"),
    ("gradient of up_bias_EJ", "bias"),
    ("gradient of down_bias_EH", "bias"),
)


@dataclass(frozen=True)
class Check:
    """One comparison: the difference from float64 or, for two runs, 0 if their bits are equal and else infinity."""

    name: str
    difference: float


def self_check(device: torch.device, dtype: torch.dtype, difference: Difference) -> Iterator[Check]:
    """Compare outputs and gradients with the reference in float64, and two runs with each other, bit for bit.

    Args:
        device: A GPU, where the Triton kernels are checked; on any other device the CPU path is.
        dtype: float32, float16 or bfloat16.
        difference: Measures how far a result is from what is expected (`moeify.measure.relative_difference`).

    Yields:
        Checks, whose difference is at most the tolerance of `dtype` if all is well.
    """
    for case in CASES:
        yield from check_experts(case, dtype, device, difference)
    yield from _check_grouped_linear(dtype, device, difference)
    if device.type == "cuda":
        yield from _check_blocksparse(dtype, device, difference)


def suspects(names: Iterable[str]) -> list[str]:
    """Return the kernels to keep away from, by the names of the checks that went wrong: of each case the first."""
    wrong: dict[str, set[str]] = {}
    for name in names:
        case, _, part = name.partition(": ")
        wrong.setdefault(case, set()).add(part)
    found = []
    for case, parts in wrong.items():
        written = [kernel for part, kernel in _WRITTEN_BY if part in parts]
        found.append(written[0] if written else "one without fixed results" if parts == {"run twice"} else case)
    return sorted(set(found))


def check_experts(case: Case, dtype: torch.dtype, device: torch.device, difference: Difference) -> Iterator[Check]:
    """Compare the output and all gradients of one case; see `self_check`."""
    inputs = make_inputs(case, dtype, device)
    first, second = (_run(inputs, "auto") for _ in range(2))
    expected = _run(inputs._replace(**{name: getattr(inputs, name).double() for name in FIELDS}), "reference")
    for name, got, want in zip(("output", *(f"gradient of {n}" for n in FIELDS)), first, expected, strict=True):
        yield Check(f"experts {case}: {name}", difference(got, want))
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    yield Check(f"experts {case}: run twice", 0.0 if same else torch.inf)


def _run(inputs: ExpertInputs, implementation: str) -> list[Tensor]:
    """Return the output and the gradients of the six float inputs."""
    leaves: dict[str, Any] = {name: getattr(inputs, name).detach().requires_grad_() for name in FIELDS}
    out = experts(**inputs._replace(**leaves)._asdict(), implementation=implementation)
    return [out, *torch.autograd.grad(out, list(leaves.values()), inputs.x_TH.roll(1, 0))]


def _check_grouped_linear(dtype: torch.dtype, device: torch.device, difference: Difference) -> Iterator[Check]:
    x, ids, _, up, *_ = make_inputs(Case(96, 1, 5, 72, 40), dtype, device)
    offsets, bias = routing_layout(ids, 5).offsets_E1, up[..., 0].clone()
    got = grouped_linear(x, up, bias, offsets)
    want = grouped_linear(x.double(), up.double(), bias.double(), offsets, "reference")
    yield Check("grouped linear", difference(got, want))


def _check_blocksparse(dtype: torch.dtype, device: torch.device, difference: Difference) -> Iterator[Check]:
    from moeify.kernels.gpu.blocksparse import dds, dsd, sdd

    x, ids, _, up, *_ = make_inputs(Case(300, 1, 5, 72, 40), dtype, device)
    topology = block_topology(routing_layout(ids, 5).offsets_E1, 300, 80, 64)
    w = up.reshape(400, 72).t()
    data = sdd(x, w, topology)
    yield Check("sdd", difference(data, to_blocks(x.double() @ w.double(), topology)))
    sparse = to_dense(data, topology).double()
    products: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
        "dsd": (lambda: dsd(data, w.t(), topology), sparse @ w.t().double()),
        "dsd transposed": (lambda: dsd(data, x, topology, transpose=True), sparse.t() @ x.double()),
        "dds": (lambda: dds(x.t(), data, topology), x.t().double() @ sparse),
        "dds transposed": (lambda: dds(w, data, topology, transpose=True), w.double() @ sparse.t()),
    }
    for name, (product, want) in products.items():
        yield Check(name, difference(product(), want))


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> ExpertInputs:
    """Return random inputs with both biases, of a size that makes errors visible."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, case.experts + 1, (case.tokens, case.top_k), generator=g)
    rows = 2 * case.intermediate if case.gated else case.intermediate

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=g) * scale).to(device, dtype)

    return ExpertInputs(
        x_TH=randn(case.tokens, case.hidden),
        expert_ids_TK=ids.to(device),
        weights_TK=randn(case.tokens, case.top_k),
        up_EJH=randn(case.experts, rows, case.hidden, scale=case.hidden**-0.5),
        down_EHI=randn(case.experts, case.hidden, case.intermediate, scale=case.intermediate**-0.5),
        up_bias_EJ=randn(case.experts, rows, scale=0.3),
        down_bias_EH=randn(case.experts, case.hidden, scale=0.3),
        activation=case.activation,
        gated=case.gated,
    )
