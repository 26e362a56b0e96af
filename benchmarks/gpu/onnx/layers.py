"""Single layers: every form that an export for CUDA writes, beside a dense FFN and transformers' block in PyTorch."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
import transformers
from torch import Tensor, nn

from benchmarks.gpu.layer import captured
from benchmarks.gpu.onnx.jobs import models_folder
from benchmarks.gpu.onnx.sessions import Bound, milliseconds, open_session
from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import SHAPES, Shape
from moeify.export.capture.to_onnx import to_onnx
from moeify.export.capture.trace import capture
from moeify.export.lower.layers import lower
from moeify.export.targets import TARGETS, Form
from moeify.kernels import ops

_transformers: Any = transformers  # for its untyped parts
_torch: Any = torch
LAYERS = {"small 8x": Shape(0, 1024, 2048, 8, 2), "Qwen3-30B": SHAPES["Qwen3-30B-A3B"]}
BIG = {"Mixtral-8x7B": SHAPES["Mixtral-8x7B"]}
TINY = Shape(0, 64, 128, 8, 2)
_CUDA = TARGETS["cuda"].forms
DENSE = "dense float16"
FORMS: dict[str, tuple[torch.dtype, Form]] = {
    "MoE float16": (torch.float16, _CUDA[None]),
    "MoE bfloat16": (torch.bfloat16, _CUDA[None]),
    "QMoE int8": (torch.float16, _CUDA["int8"]),
    "QMoE int4": (torch.float16, _CUDA["int4"]),
    DENSE: (torch.float16, TARGETS["portable"].forms[None]),
}
FORMS_OF_BIG = ("MoE float16", "QMoE int4", DENSE)
LARGE = 2 * 10**8  # weights of a layer that takes seconds to load again


class RoutedLayer(nn.Module):
    """A router and gated experts on moeify's operator."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> nn.Parameter:
            values = torch.randn(size, generator=generator, device=device) * size[-1] ** -0.5
            return nn.Parameter(values.cpu(), requires_grad=False)

        self.top_k = shape.top_k
        self.router = randn(shape.experts, shape.hidden)
        self.up = randn(shape.experts, 2 * shape.intermediate, shape.hidden)
        self.down = randn(shape.experts, shape.hidden, shape.intermediate)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the experts of tokens (T, H)."""
        logits, ids = (x @ self.router.t()).float().topk(self.top_k, dim=-1)
        weights = logits.softmax(-1).to(x.dtype)
        return ops.experts(x, ids, weights, self.up, self.down, activation="silu", gated=True)


class DenseLayer(nn.Module):
    """A gated FFN as wide as the experts that a token visits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        active = shape.top_k * shape.intermediate
        self.gate, self.up = (nn.Linear(shape.hidden, active, bias=False) for _ in range(2))
        self.down = nn.Linear(active, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (T, H)."""
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


def _shape(run: Run, label: str) -> Shape:
    return TINY if run.dry else (LAYERS | BIG)[label]


def _path(run: Run, label: str, form: str) -> Path:
    return models_folder(run) / f"layer-{label}-{form}.onnx".replace(" ", "_")


def write_graphs(run: Run, label: str) -> None:
    """Write every form of one layer, as `export_onnx` lowers it."""
    shape = _shape(run, label)
    for form in FORMS_OF_BIG[1:] if run.dry else FORMS_OF_BIG if label in BIG else FORMS:
        if run.left() < 8:
            run.put("graph of a layer not written", layer=label, form=form)
            continue
        dtype, lowered = FORMS[form]
        layer = (DenseLayer(shape) if form == DENSE else RoutedLayer(shape, run.device)).to(dtype)
        model = to_onnx(capture(layer, {"x": torch.randn(5, shape.hidden).to(dtype)}))
        lower(model, lowered)
        path = _path(run, label, form)
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
        run.put("graph of a layer", layer=label, form=form, megabytes=Path(f"{path}.data").stat().st_size / 1e6)


def stage(run: Run) -> None:
    """Time each form of each layer, and transformers' block."""
    _time_all(run, list(LAYERS)[: 1 if run.dry else None])


def big(run: Run) -> None:
    """Time a layer whose weights fill gigabytes."""
    if not run.dry:
        _time_all(run, list(BIG))


def _time_all(run: Run, labels: list[str]) -> None:
    for label in labels:
        for form in FORMS:
            if _path(run, label, form).exists() and run.left() > 6:
                run.attempt(f"{label} {form}", _time_form, run, label, form)
                gc.collect()
        for dtype in (torch.float32,) if run.dry else (torch.bfloat16, torch.float16):
            if run.left() > 5:
                run.attempt(f"{label} torch", _time_torch, run, label, dtype)
        run.free_memory()


def _tokens(run: Run) -> tuple[int, ...]:
    return (1, 8) if run.dry else (1, 8, 512, 2048)


def _time_form(run: Run, label: str, form: str) -> None:
    """Time one form by the number of tokens; few tokens as a CUDA graph too."""
    shape, path = _shape(run, label), _path(run, label, form)
    session, taken, finite = open_session(run, path), {}, True
    for tokens in _tokens(run):
        bound = Bound(run, session, {"x": torch.randn(tokens, shape.hidden)})
        taken[tokens] = milliseconds(run.device, bound.run)
        finite &= all(bool(torch.isfinite(y).all()) for y in bound.run().values())
    run.put("layer", layer=label, form=form, ok=finite, ms=taken)
    del session
    for tokens in _tokens(run)[:2] if shape.hidden * shape.intermediate * shape.experts < LARGE else (1,):
        session = open_session(run, path, graph=True)
        bound = Bound(run, session, {"x": torch.randn(tokens, shape.hidden)})
        run.put("layer", layer=label, form=f"{form}, graph", ms={tokens: milliseconds(run.device, bound.run)})


def _stock(run: Run, label: str, dtype: torch.dtype) -> Any:
    """Return transformers' own sparse block, with its grouped product."""
    from transformers.models.mixtral import modeling_mixtral

    stock: Any = modeling_mixtral
    shape = _shape(run, label)
    config = _transformers.MixtralConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with run.device:
        block = stock.MixtralSparseMoeBlock(config).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return block.to(dtype)


@torch.no_grad()
def _time_torch(run: Run, label: str, dtype: torch.dtype) -> None:
    """Time transformers' block, launched and replayed from a CUDA graph."""
    block, eager, replayed = _stock(run, label, dtype), {}, {}
    for tokens in _tokens(run):
        x = torch.randn(1, tokens, _shape(run, label).hidden, device=run.device, dtype=dtype)

        def work(x: Tensor = x) -> Tensor:
            y: Tensor = block(x)
            return y

        eager[tokens] = milliseconds(run.device, work)
        if not run.dry:
            replayed[tokens] = milliseconds(run.device, captured(work)[0].replay)
    run.put("layer", layer=label, form=f"torch grouped_mm {dtype}", ms=eager)
    run.put("layer", layer=label, form=f"torch grouped_mm {dtype}, graph", ms=replayed)


@torch.no_grad()
def compiled(run: Run) -> None:
    """Time transformers' block under `torch.compile(mode="reduce-overhead")`."""
    for label in list(LAYERS)[: 1 if run.dry else None]:
        for tokens in (1,) if run.dry else (1, 512):
            if run.left() > (2 if run.dry else 12):
                run.attempt(f"compile {label}", _time_compiled, run, label, tokens)


def _time_compiled(run: Run, label: str, tokens: int) -> None:
    dtype = torch.float32 if run.dry else torch.bfloat16
    block = _stock(run, label, dtype)
    fast = block if run.dry else _torch.compile(block, mode="reduce-overhead", dynamic=False)
    x = torch.randn(1, tokens, _shape(run, label).hidden, device=run.device, dtype=dtype)
    taken = {tokens: milliseconds(run.device, lambda: fast(x))}
    run.put("layer", layer=label, form="torch.compile, reduce-overhead", ms=taken)
