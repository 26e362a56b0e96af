"""Text from an exported causal language model, in whichever ONNX Runtime is installed. Needs no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from moeify.errors import ConfigError, MoeifyError
from moeify.export.requirements import check_runtime, runtime_version

TOKENIZER, END_IDS, NEEDS = "moeify.tokenizer", "moeify.eos_token_ids", "moeify.onnxruntime"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass
class Speed:
    """Tokens and seconds, of the prompt and of what was generated after the first token."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0

    def summary(self) -> str:
        """Return one line for people."""
        prompt = self.prompt_tokens / max(self.prompt_seconds, 1e-9)
        new = self.new_tokens / max(self.new_seconds, 1e-9)
        return f"prompt {prompt:.1f} tokens/s ({self.prompt_tokens}), generation {new:.1f} tokens/s ({self.new_tokens})"


class TextModel:
    """An exported causal language model with its tokenizer, which the file's metadata carries.

    Args:
        path: The ONNX file.
        provider: "cpu", "cuda", or None for the best that works.
        threads: Threads inside an operator; 0 lets ONNX Runtime decide.

    Raises:
        MoeifyError: onnxruntime is missing, too old, or does not load the file, or it is no causal language model.
        ConfigError: the provider that was asked for does not work here.
    """

    def __init__(self, path: Path, *, provider: str | None = None, threads: int = 0) -> None:
        self.session = open_session(path, provider=provider, threads=threads)
        self.provider: str = self.session.get_providers()[0]
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
        if NEEDS in self.metadata:
            check_runtime(tuple(int(part) for part in self.metadata[NEEDS].split(".")))
        self.inputs = {argument.name: argument for argument in self.session.get_inputs()}
        self.states = [name for name in self.inputs if name.startswith("past_key_values.")]
        if not self.states or "input_ids" not in self.inputs:
            raise MoeifyError(
                f"{path} is no causal language model with keys and values: it takes {', '.join(self.inputs)}"
            )
        self.end_ids = {int(part) for part in self.metadata.get(END_IDS, "").split()}
        self.speed = Speed()

    def tokenizer(self) -> Any:
        """Return the tokenizer in the metadata.

        Raises:
            MoeifyError: there is none.
        """
        if TOKENIZER not in self.metadata:
            raise MoeifyError(
                "the file carries no tokenizer: export it with `moeify export`, from a folder that has one"
            )
        return import_module("tokenizers").Tokenizer.from_str(self.metadata[TOKENIZER])

    def text(self, prompt: str, max_new_tokens: int) -> Iterator[str]:
        """Yield the continuation of a prompt as it comes, greedily, until an end token or the limit."""
        tokenizer = self.tokenizer()
        ids: list[int] = []
        shown = ""
        for token in self.tokens(tokenizer.encode(prompt).ids, max_new_tokens):
            ids.append(token)
            whole = tokenizer.decode(ids)
            if not whole.endswith("\ufffd"):  # the rest of a character comes with the next token
                yield whole[len(shown) :]
                shown = whole

    def tokens(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """Yield the most probable token after each prefix; `speed` is filled meanwhile."""
        self.speed = Speed(prompt_tokens=len(prompt_ids))
        state = {name: self._value(np.zeros(self._empty_state(name), self._dtype(name))) for name in self.states}
        new, total = list(prompt_ids), 0
        for step in range(max_new_tokens):
            started = time.perf_counter()
            total += len(new)
            token, state = self._step(new, total, state)
            seconds = time.perf_counter() - started
            if step:
                self.speed.new_tokens, self.speed.new_seconds = step, self.speed.new_seconds + seconds
            else:
                self.speed.prompt_seconds = seconds
            if token in self.end_ids:
                return
            yield token
            new = [token]

    def _step(self, ids: Sequence[int], total: int, state: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Run one piece; keys and values stay where ONNX Runtime put them."""
        given = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(total - len(ids), total, dtype=np.int64)[None],
        }
        feed = {name: self._value(array) for name, array in given.items() if name in self.inputs} | state
        names = ["logits", *(name.replace("past_key_values", "present") for name in self.states)]
        logits, *presents = self.session.run_with_ort_values(names, feed)
        return int(logits.numpy()[0, -1].argmax()), dict(zip(self.states, presents, strict=True))

    def _empty_state(self, name: str) -> tuple[int, ...]:
        _, heads, _, width = self.inputs[name].shape
        return 1, heads, 0, width

    def _dtype(self, name: str) -> Any:
        return np.float16 if self.inputs[name].type == "tensor(float16)" else np.float32

    @staticmethod
    def _value(array: np.ndarray) -> Any:
        return import_module("onnxruntime").OrtValue.ortvalue_from_numpy(array)


def open_session(path: Path, *, provider: str | None = None, threads: int = 0) -> Any:
    """Open an `onnxruntime.InferenceSession` and make sure that it uses the provider that was asked for.

    Args:
        path: The ONNX file.
        provider: "cpu", "cuda", or None for the best that works.
        threads: Threads inside an operator; 0 lets ONNX Runtime decide.

    Raises:
        MoeifyError: onnxruntime is missing or does not load the file.
        ConfigError: the provider does not work here (ONNX Runtime itself would fall back to the CPU and only log it).
    """
    try:
        onnxruntime = import_module("onnxruntime")
    except ImportError as error:
        raise MoeifyError(
            "running ONNX files needs onnxruntime: pip install onnxruntime, or onnxruntime-gpu"
        ) from error
    wanted = list(_PROVIDERS.values())[::-1] if provider is None else [_PROVIDERS[provider]]
    available = [name for name in wanted if name in onnxruntime.get_available_providers()]
    if not available:
        raise ConfigError(
            f"this onnxruntime has no {wanted[0]}: pip install onnxruntime-gpu in an environment of its own"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=available)
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MoeifyError(f"onnxruntime {runtime_version()} does not load {path}: {line}") from error
    if provider is not None and session.get_providers()[0] != wanted[0]:
        raise ConfigError(
            f"{wanted[0]} does not work on this machine: onnxruntime fell back to {session.get_providers()[0]}"
        )
    return session
