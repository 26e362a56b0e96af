"""Text from an exported causal language model, in whichever ONNX Runtime is installed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moeify.errors import CheckpointError, ConfigError, told_as
from moeify.runtime.session import check_runtime, open_session

if TYPE_CHECKING:
    from onnxruntime import OrtValue
    from tokenizers import Tokenizer

TOKENIZER, END_IDS, NEEDS = "moeify.tokenizer", "moeify.eos_token_ids", "moeify.onnxruntime"
_PAST, _PRESENT = "past_key_values", "present"
_LARGEST = 2**16  # heads of a layer, or numbers of a head


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
        MoeifyError: onnxruntime is missing or too old.
        CheckpointError: It does not load the file, or the file is no causal language model, or damaged.
        ConfigError: the provider that was asked for does not work here.
    """

    def __init__(self, path: Path, *, provider: str | None = None, threads: int = 0) -> None:
        self.path = path
        self.session = open_session(path, provider=provider, threads=threads)
        self.provider: str = self.session.get_providers()[0]
        with told_as(f"{path} does not say what it is", CheckpointError):  # its names need not be UTF-8
            self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map
            self.inputs = {argument.name: argument for argument in self.session.get_inputs()}
        check_runtime(self._numbers(NEEDS, "."))
        self.states = [name for name in self.inputs if name.startswith(f"{_PAST}.")]
        if not self.states or "input_ids" not in self.inputs:
            raise CheckpointError(
                f"{path} is no causal language model with keys and values: it takes {', '.join(self.inputs)}"
            )
        self.end_ids = set(self._numbers(END_IDS))
        self.speed = Speed()

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer in the metadata.

        Raises:
            CheckpointError: There is none, or it is damaged.
        """
        if TOKENIZER not in self.metadata:
            raise CheckpointError(
                "the file carries no tokenizer: export it with `moeify export`, from a folder that has one"
            )
        library = import_module("tokenizers")
        with told_as(f"the tokenizer in {self.path} is damaged; export the model again", CheckpointError):
            tokenizer: Tokenizer = library.Tokenizer.from_str(self.metadata[TOKENIZER])
        return tokenizer

    def text(self, prompt: str, max_new_tokens: int) -> Iterator[str]:
        """Yield the continuation of a prompt as it comes, greedily, until an end token or the limit.

        Raises:
            ConfigError: The prompt is empty.
            CheckpointError: The tokenizer or the model is damaged, or the model ends before the limit.
        """
        tokenizer = self.tokenizer()
        with told_as(f"the tokenizer in {self.path} does not take the prompt", CheckpointError):
            prompt_ids = tokenizer.encode(prompt).ids
        ids: list[int] = []
        shown = ""
        for token in self.tokens(prompt_ids, max_new_tokens):
            ids.append(token)
            with told_as(f"the tokenizer in {self.path} has no token {token}", CheckpointError):
                whole = tokenizer.decode(ids)
            if not whole.endswith("\ufffd"):  # the rest of a character comes with the next token
                yield whole[len(shown) :]
                shown = whole

    def tokens(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """Yield the most probable token after each prefix; `speed` is filled meanwhile.

        Raises:
            ConfigError: There is no token in the prompt.
            CheckpointError: onnxruntime cannot run the model on these tokens.
        """
        if not prompt_ids:
            raise ConfigError("the prompt is empty: give at least one token to start from")
        self.speed = Speed(prompt_tokens=len(prompt_ids))
        state = {name: _value(self._empty_state(name)) for name in self.states}
        new, total = list(prompt_ids), 0
        for step in range(max_new_tokens):
            started = time.perf_counter()
            total += len(new)
            with told_as(f"onnxruntime cannot run {self.path} on {total} tokens", CheckpointError):
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

    def _numbers(self, key: str, separator: str | None = None) -> tuple[int, ...]:
        """Read the whole numbers in an entry of the metadata; none where there is no entry."""
        text = self.metadata.get(key, "")
        try:
            return tuple(int(part) for part in text.split(separator) if part)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path}: its metadata has {key} {text[:40]!r}: expected whole numbers; export it again"
            ) from error

    def _empty_state(self, name: str) -> np.ndarray:
        """Keys or values of no tokens.

        Raises:
            CheckpointError: The file does not say how large they are, or something absurd.
        """
        shape = self.inputs[name].shape
        if len(shape) != 4 or not all(isinstance(n, int) and 0 < n <= _LARGEST for n in (shape[1], shape[3])):
            raise CheckpointError(
                f"{self.path}: {name} has the shape {shape}: expected (batch, heads, tokens, size), "
                f"heads and size as numbers up to {_LARGEST}"
            )
        _, heads, _, size = shape
        dtype = np.float16 if self.inputs[name].type == "tensor(float16)" else np.float32
        return np.zeros((1, heads, 0, size), dtype)


def _value(array: np.ndarray) -> OrtValue:
    return import_module("onnxruntime").OrtValue.ortvalue_from_numpy(array)
