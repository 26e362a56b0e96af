"""Whole decoders: prompts and single tokens, of the files that the pool wrote and of PyTorch."""

from __future__ import annotations

import gc
import inspect
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.onnx.jobs import model_path
from benchmarks.gpu.onnx.models import build, cache_inputs, one_more_token, text_inputs
from benchmarks.gpu.onnx.sessions import Bound, milliseconds, open_session
from benchmarks.gpu.run import Run

FILES = ("mixtral-cuda-float16", "mixtral-cuda-float16-int4", "mixtral-cuda-float16-int8", "mixtral-cuda-bfloat16",
         "dense-cuda-float16", "mixtral-portable-float16")  # fmt: skip
MODELS = (("mixtral", torch.bfloat16), ("mixtral", torch.float16), ("dense", torch.float16))


def stage(run: Run) -> None:
    """Time the Mixtral-like model, and the dense one of the same active size."""
    for name in FILES:
        path = model_path(run, name)
        if path.exists() and run.left() > 5:
            run.attempt(name, _time_file, run, name, path)
            gc.collect()
    for name, dtype in MODELS[: 1 if run.dry else None]:
        if run.left() > 8:
            run.attempt(f"torch {name}", _time_torch, run, name, torch.float32 if run.dry else dtype)


def _sizes(run: Run) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return how many tokens came before, the lengths of prompts, and the batches of single tokens."""
    return (16, (32,), (1, 2)) if run.dry else (512, (512, 2048), (1, 8))


def _time_file(run: Run, name: str, path: Path) -> None:
    past, prompts, batches = _sizes(run)
    session, taken = open_session(run, path), {}
    for length in prompts:
        inputs = text_inputs(1, length, 0, 5) | cache_inputs(run, session, 1, 0)
        taken[f"prompt {length}"] = milliseconds(run.device, Bound(run, session, inputs).run)
    for batch in batches:
        bound = Bound(run, session, one_more_token(run, session, batch, past))
        taken[f"decode {batch}"] = milliseconds(run.device, bound.run)
    run.put("decoder", decoder=f"ORT {name}", ms=taken)
    taken = {}
    for batch in batches:
        replayed = open_session(run, path, graph=True)
        bound = Bound(run, replayed, one_more_token(run, replayed, batch, past))
        taken[f"decode {batch}"] = milliseconds(run.device, bound.run)
    run.put("decoder", decoder=f"ORT {name}, graph", ms=taken)


@torch.no_grad()
def _time_torch(run: Run, label: str, dtype: torch.dtype) -> None:
    """Time PyTorch, whose keys and values are made anew for each step, as ONNX Runtime's graph gets them."""
    from transformers import DynamicCache

    past, prompts, batches = _sizes(run)
    model, taken = build(label, run.dry).to(run.device, dtype), {}
    if label == "mixtral":
        model.set_experts_implementation("grouped_mm")
    config: Any = model.config
    argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def step(ids: Tensor, state: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        cache: dict[str, Any] = {argument: DynamicCache(state)} if state else {}
        logits: Tensor = model(input_ids=ids, use_cache=True, **cache).logits
        return logits

    for length in prompts:
        ids = text_inputs(1, length, 0, 5)["input_ids"].to(run.device)
        taken[f"prompt {length}"] = milliseconds(run.device, partial(step, ids, None))
    for batch in batches:
        ids = text_inputs(batch, 1, 0, 5)["input_ids"].to(run.device)
        shape = (batch, config.num_key_value_heads, past, width)
        kv = torch.randn(config.num_hidden_layers, 2, *shape, device=run.device, dtype=dtype)
        state = [(keys, values) for keys, values in kv]
        taken[f"decode {batch}"] = milliseconds(run.device, partial(step, ids, state))
    run.put("decoder", decoder=f"torch {label} {dtype}", ms=taken)
