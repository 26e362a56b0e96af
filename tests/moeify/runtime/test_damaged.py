"""An exported file that is damaged, or no file at all, is one line."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
from click.testing import Result

from moeify.errors import CheckpointError, ConfigError
from moeify.runtime.session import open_session
from moeify.runtime.text import TextModel
from tests.moeify.command import moeify_command
from tests.moeify.runtime.decoder import WORD_LEVEL, decoder


def saved(folder: Path, proto: onnx.ModelProto) -> Path:
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def speak(path: Path, prompt: str = "w1") -> str:
    return "".join(TextModel(path, provider="cpu", threads=1).text(prompt, 9))


def test_the_whole_file_speaks_until_its_end(tmp_path: Path) -> None:
    assert speak(saved(tmp_path, decoder())) == "w2 w3"


@pytest.mark.parametrize(
    ("proto", "words"),
    [
        (decoder(needs="one.two"), r"moeify\.onnxruntime 'one\.two': expected whole numbers"),
        (decoder(ends="2 x"), r"moeify\.eos_token_ids '2 x': expected whole numbers"),
        (decoder(ends="9" * 5000), "expected whole numbers"),
        (decoder(tokenizer="{"), r"the tokenizer in .* is damaged; export the model again \(.+\)"),
        (decoder(tokenizer="[" * 100_000), "is damaged"),
        (decoder(tokenizer=WORD_LEVEL % ""), "does not take the prompt"),
        (decoder(tokenizer=WORD_LEVEL % '"w0": 7777'), "onnxruntime cannot run .* on 1 tokens"),
        (decoder(heads="heads"), "has the shape .*'heads'.*: expected"),
        (decoder(size=2**40), "has the shape .*: expected"),
        (decoder(heads=0), "has the shape .*: expected"),
    ],
)
def test_damage_is_one_line(proto: onnx.ModelProto, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        speak(saved(tmp_path, proto))
    assert "\n" not in str(caught.value) and "model.onnx" in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("prompt", ["", "   "])
def test_a_prompt_without_tokens(prompt: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        speak(saved(tmp_path, decoder()), prompt)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "none", "dangling", "name too long"])
def test_only_a_regular_file_is_opened(kind: str, tmp_path: Path) -> None:
    path = {"device": Path("/dev/zero"), "name too long": tmp_path / ("x" * 300)}.get(kind, tmp_path / "x.onnx")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="is not a file: give an ONNX file"):
        open_session(path)


def run(path: Path, *options: str) -> Result:
    return moeify_command("run", path, "--threads", "1", *options)


def test_an_error_after_the_first_words_starts_on_a_line_of_its_own(tmp_path: Path) -> None:
    result = run(saved(tmp_path, decoder(ends="")), "--prompt", "w3")
    assert (result.exit_code, result.stdout) == (1, "w4\n")
    assert result.stderr.startswith("Error: onnxruntime cannot run") and result.stderr.count("\n") == 1


def test_what_the_model_says_does_nothing_to_the_terminal(tmp_path: Path) -> None:
    words = '"w3": 3, "\\u001b[1m": 4'
    result = run(
        saved(tmp_path, decoder(tokenizer=WORD_LEVEL % words, ends="")), "--prompt", "w3", "--max-new-tokens", "1"
    )
    assert (result.exit_code, result.stdout) == (0, "\\x1b[1m\n")


def test_there_is_an_end_to_the_tokens_that_may_be_asked_for(tmp_path: Path) -> None:
    result = run(saved(tmp_path, decoder()), "--prompt", "w0", "--max-new-tokens", "9999999")
    assert result.exit_code == 2 and "9999999 is not in the range" in result.stderr
