"""torchao's `quantize_` and its config for `from_pretrained`, on linear layers and stacked experts."""

from __future__ import annotations

from typing import Any

import torch

from sweeps.ecosystem.check import CONVERTED, LINE, NATIVE, Check
from sweeps.ecosystem.models import Subject, library, logits
from sweeps.ecosystem.quantized import expert_linears, judge

PARAMETERS = r"re:.*\.experts\.(gate_up_proj|up_proj|down_proj)$"


def linears(subject: Subject) -> None:
    """Quantize every `nn.Linear`: attention, and what else is one."""
    Int8WeightOnlyConfig = library("torchao.quantization").Int8WeightOnlyConfig
    quantize_ = library("torchao.quantization").quantize_

    model = subject.load()
    expected = logits(model)
    quantize_(model, Int8WeightOnlyConfig())
    judge(model, expected, 8)


def stacks(subject: Subject) -> None:
    """Quantize the stacked experts as parameters, by their names."""
    FqnToConfig = library("torchao.quantization").FqnToConfig
    Int8WeightOnlyConfig = library("torchao.quantization").Int8WeightOnlyConfig
    quantize_ = library("torchao.quantization").quantize_

    model = subject.load()
    expected = logits(model)
    quantize_(model, FqnToConfig({PARAMETERS: Int8WeightOnlyConfig(set_inductor_config=False)}), filter_fn=None)
    _stacks_are_quantized(model)
    judge(model, expected, 8)


def stacks_linearized(subject: Subject) -> None:
    """Quantize the experts as linear layers."""
    Int8WeightOnlyConfig = library("torchao.quantization").Int8WeightOnlyConfig
    quantize_ = library("torchao.quantization").quantize_

    import moeify

    model: Any = subject.load()
    expected = logits(model)
    moeify.linearize(model)
    quantize_(model, Int8WeightOnlyConfig())
    held = expert_linears(model).values()
    assert held and all(type(module.weight) is not torch.nn.Parameter for module in held), "experts stayed as they were"
    judge(model, expected, 8)


def on_load(subject: Subject) -> None:
    """Quantize while loading, with transformers' `TorchAoConfig`."""
    Int8WeightOnlyConfig = library("torchao.quantization").Int8WeightOnlyConfig
    TorchAoConfig = library("transformers").TorchAoConfig

    expected = logits(subject.load())
    model = subject.load(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    found = judge(model, expected, 8)
    model.save_pretrained(subject.scratch / "quantized")
    assert torch.equal(logits(subject.load(subject.scratch / "quantized")), found), (
        "loaded again, it computes otherwise"
    )


def _stacks_are_quantized(model: Any) -> None:
    named = [(name, p) for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3]
    plain = [
        name for name, parameter in named if type(parameter) is torch.nn.Parameter and not hasattr(parameter, "qdata")
    ]
    assert named and not plain, f"{len(plain)} of {len(named)} stacks stayed as they were"


CHECKS = (
    Check("torchao", "`quantize_`, int8 weights, every `nn.Linear`", linears),
    Check("torchao", "`quantize_`, int8 weights, experts", stacks, CONVERTED + NATIVE[:1], LINE, stacks_linearized),
    Check("torchao", "`from_pretrained` with `TorchAoConfig` (int8), saved and loaded", on_load),
)
