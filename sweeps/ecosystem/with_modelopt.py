"""NVIDIA's ModelOpt: quantizers on linear layers and on each expert of a stack, calibrated."""

from __future__ import annotations

from typing import Any

import torch

from sweeps.ecosystem.check import CONVERTED, NATIVE, Check
from sweeps.ecosystem.models import Subject, batch, library, logits
from sweeps.ecosystem.quantized import judge


def int8(subject: Subject) -> None:
    """Calibrate int8 for weights and activations, experts included; save and load by `save_pretrained`."""
    library("modelopt.torch.opt").enable_huggingface_checkpointing()
    model, found = _int8(subject)
    model.save_pretrained(subject.scratch / "quantized")
    assert torch.equal(logits(subject.load(subject.scratch / "quantized")), found), "loaded again, it differs"


def int8_restored(subject: Subject) -> None:
    """The same, saved and restored by ModelOpt's own functions."""
    mto = library("modelopt.torch.opt")
    model, found = _int8(subject)
    mto.save(model, subject.scratch / "quantized.pt")
    restored = mto.restore(subject.load(), subject.scratch / "quantized.pt")
    assert torch.equal(logits(restored), found), "restored, it differs"


def _int8(subject: Subject) -> tuple[Any, torch.Tensor]:
    mtq = library("modelopt.torch.quantization")
    model: Any = subject.load()
    expected = logits(model)
    model = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, _calibrate)
    quantizers = {name: part for name, part in model.named_modules()
                  if ".experts." in name and "_weight_quantizer" in name and hasattr(part, "amax")}  # fmt: skip
    without = [name for name, quantizer in quantizers.items() if quantizer.is_enabled and quantizer.amax is None]
    assert quantizers and not without, f"{len(without)} of {len(quantizers)} quantizers of experts have no range"
    return model, judge(model, expected, 8)


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
    Check("nvidia-modelopt", "`mtq.quantize`, int8, a quantizer for each expert; saved and loaded", int8,
          CONVERTED + NATIVE[:1], "mto.save(model, file), later mto.restore(model, file)", int8_restored),
    Check("nvidia-modelopt", "`mtq.quantize`, fp8, then `export_hf_checkpoint` (vLLM's format)", export,
          CONVERTED + NATIVE),
)  # fmt: skip
