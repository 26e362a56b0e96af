"""optimum, and its ONNX exporter, whose newest release wants an older transformers than moeify."""

from __future__ import annotations

from importlib.metadata import requires, version
from typing import Any

from sweeps.ecosystem.check import Check
from sweeps.ecosystem.models import Subject, library, logits


def onnx(subject: Subject) -> None:
    """Export for text generation and compare in ONNX Runtime."""
    from packaging.requirements import Requirement

    for text in requires("optimum-onnx") or []:
        wanted = Requirement(text)
        if wanted.name == "transformers" and wanted.marker is None:
            found = version("transformers")
            assert wanted.specifier.contains(found), f"it wants {wanted}, and moeify transformers 5.17 or newer"
    main_export = library("optimum.exporters.onnx").main_export

    main_export(str(subject.path), str(subject.scratch / "onnx"), task="text-generation")


def quantization(subject: Subject) -> None:
    """Quantize by optimum's own GPTQ."""
    library("gptqmodel")  # optimum says only that a name is not defined
    GPTQQuantizer = library("optimum.gptq").GPTQQuantizer

    model: Any = subject.load()
    expected = logits(model)
    quantizer = GPTQQuantizer(bits=4, group_size=32, dataset=["w1 w2 w3 w4 w5 w6 w7 w8"] * 4, model_seqlen=16)
    quantizer.quantize_model(model, subject.tokenizer())
    assert logits(model).shape == expected.shape


CHECKS = (
    Check("optimum-onnx", "`main_export` (instead: `moeify export`)", onnx, ("llama",),
          issue="huggingface/optimum-onnx#114"),
    Check("optimum", "`GPTQQuantizer`, 4 bits", quantization, ("llama", "mixtral"),
          issue="it needs gptqmodel, whose release 7.7.0 needs torch 2.14.1"),
)  # fmt: skip
