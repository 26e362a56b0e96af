"""`moeify.export_onnx`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from moeify.export.report import OnnxReport
from moeify.export.request import check_request


def export_onnx(
    model: nn.Module,
    path: str | Path,
    target: str = "cpu",
    quantize: str | None = None,
    *,
    example_inputs: Mapping[str, object] | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> OnnxReport:
    """Write a model for ONNX Runtime; the file appears after it agreed with PyTorch, or not at all.

    A causal language model gets keys and values as inputs and outputs, so that one graph serves prompts and single
    tokens. Batch and sequence are dynamic.

    Args:
        model: Converted by moeify, an MoE of transformers, or dense; in a dtype that the target computes in.
        path: The ONNX file. Weights of large models go into `PATH.data` beside it.
        target: "portable" uses standard ONNX only; "cpu" also ONNX Runtime's own operators where they are faster;
            "cuda" what onnxruntime-gpu has kernels for.
        quantize: "int8" or "int4" stores the experts' weights so.
        example_inputs: Keyword arguments of the forward; None makes them up for a model of transformers.
        overwrite: Replace the file if it exists.
        metadata: More entries for the file's metadata.

    Raises:
        MoeifyError: a package is missing or too old.
        ConfigError: an unknown target, or a dtype that it does not compute in.
        RefusedError: the model cannot be expressed; the message says what and where.
        VerificationError: the graph gave other results than PyTorch.
        CheckpointError: the file cannot be written.
    """
    request = check_request(Path(path), target, quantize, _narrowest_dtype(model), overwrite=overwrite)
    from moeify.export.pipeline import export  # needs the packages that were just checked

    return export(model, request, example_inputs, metadata or {})


def _narrowest_dtype(model: nn.Module) -> str:
    """Return the narrowest floating-point dtype of the weights."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.float32}
    return str(min(dtypes, key=lambda dtype: (dtype.itemsize, str(dtype)))).removeprefix("torch.")
