"""The models that the pool exports, the most important first: nothing here imports torch."""

from __future__ import annotations

from typing import NamedTuple


class Job(NamedTuple):
    """What is exported, and how."""

    model: str
    target: str
    dtype: str
    quantize: str | None = None

    def __str__(self) -> str:
        """Name the job and its file."""
        return "-".join(part for part in self if part)


JOBS = {
    str(job): job
    for job in (  # the most important first
        Job("mixtral", "cuda", "float16"), Job("mixtral", "cuda", "float16", "int4"),
        Job("mixtral", "cuda", "bfloat16"), Job("mixtral", "cuda", "float16", "int8"),
        Job("dense", "cuda", "float16"), Job("qwen3", "cuda", "float16"),
        Job("gpt2", "cuda", "float16"), Job("gptoss", "cuda", "float16"), Job("shared", "cuda", "float16"),
        Job("bert", "cuda", "float16"), Job("mixtral", "cuda", "float32"), Job("qwen3", "cuda", "float16", "int4"),
        Job("gptoss", "cuda", "bfloat16", "int4"), Job("qwen3", "cuda", "bfloat16", "int8"),
        Job("shared", "cuda", "float16", "int8"), Job("mixtral", "cuda", "bfloat16", "int4"),
        Job("bert_exact", "portable", "float16"), Job("gptoss", "cuda", "bfloat16"), Job("gpt2", "cuda", "float32"),
        Job("mixtral", "portable", "float16"), Job("qwen3", "cuda", "bfloat16"), Job("shared", "cuda", "bfloat16"),
    )
}  # fmt: skip
