"""Small whole inputs whose weights are computed as they are read: quantized in four formats, and an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_GROUP = 8
_Parts = Mapping[str, Tensor]


def _words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int()


def _fp8(weight: Tensor) -> _Parts:
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(2, 2)}


def _gptq(weight: Tensor) -> _Parts:
    rows, columns = weight.shape
    groups = columns // _GROUP
    parts = {"qweight": _words(columns // 8, rows), "qzeros": _words(groups, rows // 8)}
    return {**parts, "scales": torch.rand(groups, rows).half() / 9, "g_idx": torch.arange(columns).int() // _GROUP}


def _nf4(weight: Tensor) -> _Parts:
    state = {"blocksize": 64, "shape": list(weight.shape), "quant_type": "nf4", "dtype": "float32",
             "nested_blocksize": 2, "nested_offset": 0.1}  # fmt: skip
    blocks = -(-weight.numel() // 64)
    return {
        "weight": torch.randint(256, (weight.numel() // 2, 1)).to(torch.uint8),
        "weight.absmax": torch.randint(256, (blocks,)).to(torch.uint8),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.nested_absmax": torch.rand(-(-blocks // 2)),
        "weight.nested_quant_map": torch.linspace(0, 1, 256),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def _packed(weight: Tensor) -> _Parts:
    rows, columns = weight.shape
    scale = torch.rand(rows, columns // _GROUP).bfloat16() / 9
    return {
        "weight_packed": _words(rows, columns // 8),
        "weight_scale": scale,
        "weight_shape": torch.tensor([*weight.shape]),
    }


_SCHEME: dict[str, Any] = {"group_0": {"weights": {"num_bits": 4, "group_size": _GROUP}}}
_FORMATS: dict[str, tuple[Callable[[Tensor], _Parts], dict[str, Any]]] = {
    "fp8": (_fp8, {"quant_method": "fp8"}),
    "gptq": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": _GROUP, "checkpoint_format": "gptq"}),
    "nf4": (_nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "packed": (_packed, {"quant_method": "compressed-tensors", "config_groups": _SCHEME}),
}


def quantize(folder: Path, name: str) -> None:
    """Turn the projections of a checkpoint into random numbers of a format."""
    part, settings = _FORMATS[name]
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for key, value in load_file(folder / "model.safetensors").items():
        module = key.removesuffix(".weight")
        found = part(value) if "_proj" in key else {"weight": value}
        tensors |= {f"{module}.{inner}": tensor for inner, tensor in found.items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def adapt(base: Path, folder: Path) -> None:
    """Write an adapter of a checkpoint."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for key, value in load_file(base / "model.safetensors").items():
        if key.endswith("q_proj.weight"):
            module = f"base_model.model.{key.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.rand(2, value.shape[1])
            tensors[f"{module}.lora_B.weight"] = torch.rand(value.shape[0], 2)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 4, "use_rslora": False,
                "fan_in_fan_out": False, "init_lora_weights": True, "alpha_pattern": {"q_proj": 2}}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
