"""Ways to compute the experts of a layer on a GPU: ours, torch's, and other projects', each in the calls it documents.

Shape legend: T tokens, K choices per token, E experts, H hidden size, I intermediate size.
"""

# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.run import first_line
from moeify.kernels import reference
from moeify.kernels.layout import routing_layout
from moeify.kernels.ops import combine, dispatch, experts
from moeify.measure import relative_difference, tolerance_of

Weights = tuple[Tensor, ...]
CHECKED = 512  # tokens: the reference takes experts one by one


@dataclass(frozen=True)
class Inputs:
    """A routed batch: `x (T, H)`, `ids (T, K)`, `weights (T, K)`, `up (E, 2I, H)` gate rows first, `down (E, H, I)`."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Candidate:
    """One way to compute SwiGLU experts.

    Attributes:
        run: From x, ids, weights and the experts' own weights as `store` left them to (T, H).
        store: From up and down to the layout in which the project keeps them, which is not timed.
        module: What must be installed, "" for nothing.
    """

    run: Callable[..., Any]
    store: Callable[[Tensor, Tensor], Weights] = lambda up, down: (up, down)
    module: str = ""


def refusal(candidate: Candidate, inputs: Inputs) -> str | None:
    """Return why a candidate is not to be timed; None if its output and its gradients of x and weights are right.

    It computes all tokens, so that what is checked is what is timed; the reference computes the first ones.
    """
    few = Inputs(inputs.x[:CHECKED], inputs.ids[:CHECKED], inputs.weights[:CHECKED], inputs.up, inputs.down)
    wide = Inputs(few.x.float(), few.ids, few.weights.float(), few.up.float(), few.down.float())
    try:
        want = _results(_reference, wide, (wide.up, wide.down))
        got = _results(candidate.run, inputs, candidate.store(inputs.up, inputs.down))
    except Exception as error:  # another project's, of any kind
        return f"{type(error).__name__}: {first_line(error)}"
    limit = tolerance_of(inputs.x.dtype)
    for name, a, b in zip(("output", "gradient of x", "gradient of weights"), got, want, strict=True):
        difference = relative_difference(a[:CHECKED], b)
        if not difference <= limit:
            return f"wrong {name}: off by {difference:.1e}, tolerance {limit:.0e}"
    return None


def _results(run: Callable[..., Any], inputs: Inputs, stored: Weights) -> Weights:
    x, weights = (t.detach().requires_grad_() for t in (inputs.x, inputs.weights))
    out = run(x, inputs.ids, weights, *(t.detach().requires_grad_() for t in stored))
    return out, *torch.autograd.grad(out, (x, weights), x.detach().roll(1, 1).to(out.dtype))


def _reference(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return reference.experts(x, ids, weights, up.detach(), down.detach(), None, None, "silu", True)


def _moeify(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The operator under test."""
    return experts(x, ids, weights, up, down, activation="silu", gated=True)


def _grouped_mm(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Gather, torch's grouped product, activation, grouped product, sum."""
    layout = routing_layout(ids, up.shape[0])
    ends = layout.offsets_E1[1:]
    gate, linear = F.grouped_mm(dispatch(x, layout), up.mT, offs=ends).chunk(2, -1)
    return combine(F.grouped_mm(F.silu(gate) * linear, down.mT, offs=ends), weights, layout)


def _loop(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One product per expert; waits for the device to know how many rows each has."""
    layout = routing_layout(ids, up.shape[0])
    rows, parts = dispatch(x, layout), []
    for e, (start, end) in enumerate(pairwise(layout.offsets_E1.tolist())):
        gate, linear = (rows[start:end] @ up[e].t()).chunk(2, -1)
        parts.append((F.silu(gate) * linear) @ down[e].t())
    return combine(torch.cat(parts), weights, layout)


def _megablocks(x: Tensor, ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Any:
    """The grouped path, which is its default: the block-sparse one refuses Triton from 3.2 on. Waits for the device."""
    from grouped_gemm.ops import gmm
    from megablocks import ops

    count, top_k, flat = gate.shape[0], ids.shape[1], ids.flatten().int()
    order, sizes = ops.sort(flat, max(1, (count - 1).bit_length())), ops.histogram(flat, count)
    bins = ops.inclusive_cumsum(sizes, 0).view(-1)
    rows, sizes = ops.gather(x, order[1], order[0], bins, top_k), sizes.cpu().long()
    a = F.silu(gmm(rows, gate, sizes, trans_b=True)) * gmm(rows, up, sizes, trans_b=True)
    return ops.scatter(gmm(a, down, sizes), order[1], order[0], weights.flatten(), bins, top_k)


def _split(up: Tensor, down: Tensor) -> Weights:
    gate, linear = up.chunk(2, 1)
    return gate.contiguous(), linear.contiguous(), down.transpose(1, 2).contiguous()


def _scattermoe(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Any:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    routing = flatten_sort_count(ids, num_experts=up.shape[0])
    gate, linear = parallel_linear(x, up.mT, ids.shape[1], *routing, grouped_out=True).chunk(2, -1)
    return parallel_linear(F.silu(gate) * linear, down.mT, 1, *routing, gates=weights, grouped_in=True)


def _liger(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Any:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x, up, down, ids.int(), weights)


def _sonicmoe(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Any:
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    token = torch.arange(x.shape[0], dtype=torch.int32, device=x.device).repeat_interleave(ids.shape[1])
    stream: Any = torch.cuda.current_stream
    return moe_general_routing_inputs(
        x, weights.flatten(), token, ids.flatten().int(), up.permute(1, 2, 0), None, down.permute(1, 2, 0), None,
        E=up.shape[0], stream_id=stream().cuda_stream, activation_type=ActivationType.SWIGLU,
        is_inference_mode_enabled=not torch.is_grad_enabled(),
    )[0]  # fmt: skip


def _interleaved(up: Tensor, down: Tensor) -> Weights:
    """Gate and up rows by turns."""
    return torch.stack(up.chunk(2, 1), 2).flatten(1, 2), down


def _transformers(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Any:
    """The experts of transformers' own models, with its grouped product."""
    module = _mixtral_experts(*down.shape)
    return torch.func.functional_call(module, {"gate_up_proj": up, "down_proj": down}, (x, ids, weights))


@cache
def _mixtral_experts(count: int, hidden: int, intermediate: int) -> nn.Module:
    """Return Mixtral's experts without weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config: Any = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=count)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        return MixtralExperts(config)


CANDIDATES = {
    "moeify": Candidate(_moeify),
    "grouped_mm": Candidate(_grouped_mm),
    "loop": Candidate(_loop),
    "transformers": Candidate(_transformers),
    "MegaBlocks": Candidate(_megablocks, _split, "megablocks"),
    "ScatterMoE": Candidate(_scattermoe, module="scattermoe"),
    "Liger": Candidate(_liger, module="liger_kernel"),
    "SonicMoE": Candidate(_sonicmoe, _interleaved, "sonicmoe"),
}


def installed() -> dict[str, Candidate]:
    """Return the candidates that this machine can import."""
    return {name: one for name, one in CANDIDATES.items() if not one.module or find_spec(one.module)}
