"""Text from an exported causal language model, in whichever ONNX Runtime is installed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moeify.errors import MoeifyError
from moeify.runtime.session import check_runtime, open_session

if TYPE_CHECKING:
    from onnxruntime import OrtValue
    from tokenizers import Tokenizer

TOKENIZER, END_IDS, NEEDS = "moeify.tokenizer", "moeify.eos_token_ids", "moeify.onnxruntime"
_PAST, _PRESENT = "past_key_values", "present"


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
        self.states = [name for name in self.inputs if name.startswith(f"{_PAST}.")]
        if not self.states or "input_ids" not in self.inputs:
            raise MoeifyError(
                f"{path} is no causal language model with keys and values: it takes {', '.join(self.inputs)}"
            )
        self.end_ids = {int(part) for part in self.metadata.get(END_IDS, "").split()}
        self.speed = Speed()

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer in the metadata.

        Raises:
            MoeifyError: there is none.
        """
        if TOKENIZER not in self.metadata:
            raise MoeifyError(
                "the file carries no tokenizer: export it with `moeify export`, from a folder that has one"
            )
        tokenizer: Tokenizer = import_module("tokenizers").Tokenizer.from_str(self.metadata[TOKENIZER])
        return tokenizer

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
        state = {name: _value(self._empty_state(name)) for name in self.states}
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

    def _step(self, ids: Sequence[int], total: int, state: dict[str, OrtValue]) -> tuple[int, dict[str, OrtValue]]:
        """Run some tokens; keys and values stay where ONNX Runtime put them."""
        given = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(total - len(ids), total, dtype=np.int64)[None],
        }
        feed = {name: _value(array) for name, array in given.items() if name in self.inputs} | state
        names = ["logits", *(name.replace(_PAST, _PRESENT) for name in self.states)]
        logits, *presents = self.session.run_with_ort_values(names, feed)
        return int(logits.numpy()[0, -1].argmax()), dict(zip(self.states, presents, strict=True))

    def _empty_state(self, name: str) -> np.ndarray:
        """Keys or values of no tokens."""
        _, heads, _, size = self.inputs[name].shape
        dtype = np.float16 if self.inputs[name].type == "tensor(float16)" else np.float32
        return np.zeros((1, heads, 0, size), dtype)


def _value(array: np.ndarray) -> OrtValue:
    return import_module("onnxruntime").OrtValue.ortvalue_from_numpy(array)
