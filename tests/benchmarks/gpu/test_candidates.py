"""The other projects' calls, against stand-ins with their signatures: each in plain torch, from its documentation."""

from __future__ import annotations

import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.candidates import CANDIDATES, Inputs, installed, refusal


@pytest.fixture
def inputs() -> Inputs:
    g = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=g).bfloat16()

    ids = torch.rand(21, 5, generator=g).argsort(-1)[:, :2]
    return Inputs(random(21, 24), ids, random(21, 2), random(5, 32, 24) * 24**-0.5, random(5, 24, 16) * 0.25)


def _install(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    """Put modules where `import` finds them; `__` in a name stands for a dot."""
    for name, content in modules.items():
        module = ModuleType(name.replace("__", "."))
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        package, _, inside = module.__name__.rpartition(".")
        if package:
            setattr(sys.modules.setdefault(package, ModuleType(package)), inside, module)


def _swiglu(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(rows @ gate.t()) * (rows @ up.t())) @ down.t()


def _megablocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def sort(x: Tensor, end_bit: int) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.int32 and 1 << end_bit > int(x.max())
        return x.sort(stable=True)

    def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
        assert bin_ids.equal(bin_ids.sort()[0]) and int(bins[-1]) == len(indices)
        return x[indices // top_k]

    def scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor, bins: Tensor, top_k: int) -> Tensor:
        return torch.zeros_like(x).index_put((indices,), x * weights[indices, None]).view(-1, top_k, x.shape[1]).sum(1)

    def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
        assert b.is_contiguous() and batch_sizes.dtype == torch.int64
        return torch.cat(
            [p @ (w.t() if trans_b else w) for p, w in zip(a.split_with_sizes(batch_sizes.tolist()), b, strict=True)]
        )

    ops = {
        "sort": sort,
        "histogram": lambda x, bins: x.bincount(minlength=bins).int(),
        "inclusive_cumsum": lambda x, dim: x.cumsum(dim),
        "gather": gather,
        "scatter": scatter,
    }
    _install(monkeypatch, megablocks={}, megablocks__ops=ops, grouped_gemm={}, grouped_gemm__ops={"gmm": gmm})


def _scattermoe(monkeypatch: pytest.MonkeyPatch) -> None:
    def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, ...]:
        ids, order = expert_idxs.flatten().sort()
        return ids, order, expert_idxs.flatten().bincount(minlength=num_experts).cumsum(-1)

    def parallel_linear(
        inputs: Tensor, expert_weights: Tensor, k: int, ids: Tensor, order: Tensor, expert_offsets: Tensor,
        expert_biases: Tensor | None = None, gates: Tensor | None = None, grouped_in: bool = False,
        grouped_out: bool = False,
    ) -> Tensor:  # fmt: skip
        rows = inputs if grouped_in else inputs[order // k]
        out = torch.stack([row @ expert_weights[e] for row, e in zip(rows, ids.tolist(), strict=True)])
        if not grouped_out:
            out = out[order.argsort()]
        return out if gates is None else (gates[:, None] @ out.view(*gates.shape, -1)).squeeze(1)

    module = {"flatten_sort_count": flatten_sort_count, "parallel_linear": parallel_linear}
    _install(monkeypatch, scattermoe={}, scattermoe__parallel_experts=module)


def _liger(monkeypatch: pytest.MonkeyPatch, scale: float = 1.0) -> None:
    def apply(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        assert top_k_index.dtype == torch.int32
        half = gate_up_proj.shape[1] // 2
        rows = [
            sum(
                w * _swiglu(t, gate_up_proj[e, :half], gate_up_proj[e, half:], down_proj[e])
                for e, w in zip(ids.tolist(), ws, strict=True)
            )
            for t, ids, ws in zip(x, top_k_index, top_k_weights, strict=True)
        ]
        return torch.stack(rows) * scale

    module = {"LigerFusedMoEFunction": SimpleNamespace(apply=apply)}
    _install(monkeypatch, liger_kernel={}, liger_kernel__ops={}, liger_kernel__ops__fused_moe=module)


def _sonicmoe(monkeypatch: pytest.MonkeyPatch) -> None:
    def moe_general_routing_inputs(
        x: Tensor, router_scores: Tensor, token_indices: Tensor, expert_indices: Tensor,
        w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
        E: int, stream_id: int, activation_type: str, is_inference_mode_enabled: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert w1.shape[2] == w2.shape[2] == E and w1.stride()[1] == w2.stride()[1] == 1
        assert token_indices.equal(token_indices.sort()[0]) and activation_type == "swiglu"
        rows = [
            s * _swiglu(x[t], w1[::2, :, e], w1[1::2, :, e], w2[..., e])
            for t, e, s in zip(token_indices.tolist(), expert_indices.tolist(), router_scores, strict=True)
        ]
        return torch.zeros_like(x).index_add(0, token_indices, torch.stack(rows)), expert_indices.bincount(minlength=E)

    enums = {"ActivationType": SimpleNamespace(SWIGLU="swiglu")}
    functional = {"moe_general_routing_inputs": moe_general_routing_inputs}
    _install(monkeypatch, sonicmoe={}, sonicmoe__enums=enums, sonicmoe__functional=functional)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))


STAND_INS = {"MegaBlocks": _megablocks, "ScatterMoE": _scattermoe, "Liger": _liger, "SonicMoE": _sonicmoe}


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_gives_the_reference(name: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in STAND_INS:
        STAND_INS[name](monkeypatch)
    assert refusal(CANDIDATES[name], inputs) is None


@pytest.mark.parametrize("name", STAND_INS)
def test_one_that_is_not_installed_is_said(name: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("grouped_gemm", "megablocks", "scattermoe", "liger_kernel", "sonicmoe"):
        for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, module, None)
    reason = refusal(CANDIDATES[name], inputs)
    assert reason is not None and reason.startswith("ModuleNotFoundError: ")


def test_a_wrong_result_and_an_error_are_told(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    _liger(monkeypatch, scale=1.1)
    assert re.fullmatch("wrong output: off by .*, tolerance 2e-02", refusal(CANDIDATES["Liger"], inputs) or "")
    _install(monkeypatch, liger_kernel__ops__fused_moe={"LigerFusedMoEFunction": SimpleNamespace()})
    assert (
        refusal(CANDIDATES["Liger"], inputs)
        == "AttributeError: 'types.SimpleNamespace' object has no attribute 'apply'"
    )


def test_only_what_is_installed_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.candidates.find_spec", lambda name: name == "scattermoe" or None)
    assert list(installed()) == ["moeify", "grouped_mm", "loop", "transformers", "ScatterMoE"]
