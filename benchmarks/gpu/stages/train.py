"""A converted model's training step beside transformers' Mixtral of the same shape, and beside dense models."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor

import moeify
from benchmarks.gpu.layer import GIB
from benchmarks.gpu.run import Run

_torch: Any = torch  # for its untyped parts
_transformers: Any = transformers


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    batch: int
    length: int


LARGE = Size(1024, 2816, 8, 16, 32000, 8, 1024)  # 0.6 billion parameters with 8 experts
SMALL = Size(64, 96, 2, 4, 256, 2, 16)


def stage(run: Run) -> None:
    """Train each variant for a few steps, and profile one step of ours."""
    size = SMALL if run.dry else LARGE
    variants: dict[str, Callable[[], Any]] = {
        "moeify 8x top-2": partial(_converted, run, size),
        "mixtral grouped_mm": partial(_mixtral, run, size, "grouped_mm"),
        "dense, active size": partial(_dense, run, size, 2 * size.intermediate),
        "dense, original": partial(_dense, run, size, size.intermediate),
        "mixtral eager": partial(_mixtral, run, size, "eager"),
    }
    for name, make in variants.items():
        if run.left() < 12:
            run.put("variants cut short", at=name)
            return
        run.attempt(name, _train, run, name, make, size)
        gc.collect()
        run.free_memory()


def _settings(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.hidden, "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 4 or 1, "vocab_size": size.vocab, "max_position_embeddings": 2048,
        "tie_word_embeddings": True, "attn_implementation": "sdpa",
    }  # fmt: skip


def _dense(run: Run, size: Size, intermediate: int) -> Any:
    torch.manual_seed(0)
    config = _transformers.LlamaConfig(intermediate_size=intermediate, **_settings(size))
    with run.device:
        return _transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def _converted(run: Run, size: Size) -> Any:
    config = moeify.MoEConfig(experts=8, top_k=2, attach_losses=True)
    return moeify.convert(_dense(run, size, size.intermediate), config)


def _mixtral(run: Run, size: Size, implementation: str) -> Any:
    torch.manual_seed(0)
    config = _transformers.MixtralConfig(
        intermediate_size=size.intermediate, num_local_experts=8, num_experts_per_tok=2, output_router_logits=True,
        **_settings(size),
    )  # fmt: skip
    config._experts_implementation = implementation
    with run.device:
        return _transformers.MixtralForCausalLM(config).to(torch.bfloat16)


def _train(run: Run, name: str, make: Callable[[], Any], size: Size) -> None:
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=not run.dry)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size.vocab, (size.batch, size.length), generator=generator).to(run.device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        _torch.autograd.backward(loss)
        optimizer.step()
        return loss.detach()

    losses = [step() for _ in range(1 if run.dry else 3)]
    if not run.dry:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 if run.dry else 10):
        start = time.perf_counter()
        losses.append(step())
        if not run.dry:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    rate = size.batch * size.length / median(seconds)
    run.put(
        name, step_ms=median(seconds) * 1e3, tokens_s=rate, parameters=sum(p.numel() for p in model.parameters()),
        peak_gib=0.0 if run.dry else torch.cuda.max_memory_allocated() / GIB,
        first_loss=float(losses[0]), last_loss=float(losses[-1]),
    )  # fmt: skip
    if name.startswith("moeify") and not run.dry and run.left() > 20:
        _profile(run, step)


def _profile(run: Run, step: Callable[[], object]) -> None:
    """Write the kernels of one step, the longest first."""
    kinds = _torch.profiler.ProfilerActivity
    with _torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=60)
    (run.out / "profile.txt").write_text(table)
    run.put("profiled", file="profile.txt")
