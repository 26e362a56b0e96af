"""NVIDIA's ModelOpt: quantizers on linear layers and on each expert of a stack, calibrated."""

from __future__ import annotations

from typing import Any

import torch

from sweeps.ecosystem.check import CONVERTED, NATIVE, Check
from sweeps.ecosystem.models import Subject, batch, library, logits
from sweeps.ecosystem.quantized import judge


def int8(subject: Subject) -> None:
    """Calibrate int8 for weights and activations, experts included; save the state, and restore it."""
    mto = library("modelopt.torch.opt")
    mtq = library("modelopt.torch.quantization")

    mto.enable_huggingface_checkpointing()
    model: Any = subject.load()
    expected = logits(model)
    model = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, _calibrate)
    found = judge(model, expected, 8)
    quantizers = {name: q for name, q in model.named_modules()
                  if ".experts." in name and "_weight_quantizer" in name and hasattr(q, "amax")}  # fmt: skip
    without = [name for name, q in quantizers.items() if q.is_enabled and q.amax is None]
    assert quantizers and not without, f"{len(without)} of {len(quantizers)} quantizers of experts have no range"
    model.save_pretrained(subject.scratch / "quantized")
    loaded = subject.load(subject.scratch / "quantized")
    assert torch.equal(logits(loaded), found), "loaded again, it computes otherwise"


def export(subject: Subject) -> None:
    """Write the checkpoint that vLLM and TensorRT-LLM read (FP8)."""
    mtq = library("modelopt.torch.quantization")
    export_hf_checkpoint = library("modelopt.torch.export").export_hf_checkpoint

    model: Any = mtq.quantize(subject.load(), mtq.FP8_DEFAULT_CFG, _calibrate)
    export_hf_checkpoint(model, export_dir=subject.scratch / "exported")
    from safetensors import safe_open

    names: list[str] = []
    for file in (subject.scratch / "exported").glob("*.safetensors"):
        with safe_open(file, "pt") as held:
            names += list(held.keys())
    scales = [name for name in names if ".experts." in name and name.endswith("weight_scale")]
    assert scales, "experts have no scales in the exported checkpoint"


def _calibrate(model: Any) -> None:
    with torch.no_grad():
        model(input_ids=batch()["input_ids"])


CHECKS = (
    Check("nvidia-modelopt", "`mtq.quantize`, int8, a quantizer for each expert; saved and loaded", int8),
    Check("nvidia-modelopt", "`mtq.quantize`, fp8, then `export_hf_checkpoint` (vLLM's format)", export,
          CONVERTED + NATIVE),
)  # fmt: skip
