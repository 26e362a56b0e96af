"""The model card says what is true, reads as strict YAML, and takes no harm from the source's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import moeify
from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.card import model_card, source_metadata
from moeify.conversion.checkpoint import plan_checkpoint
from moeify.conversion.dense import DenseCheckpoint
from moeify.files.limits import CARD_BYTES, YAML_BYTES
from tests.moeify import tiny
from tests.moeify.command import moeify_command

CONFIG = MoEConfig(4, 2)


class Strict(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML's safe loader, which takes no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        assert len(found) == len(node.value)
        return found


def front_of(card: str) -> dict[str, Any]:
    """The front matter; it ends at the first line of dashes, as the hub reads it."""
    assert card.startswith("---\n")
    found: Any = yaml.load(card.split("\n---\n")[0][4:], Strict)
    assert isinstance(found, dict)
    return found


def convert(src: Path, dst: Path, *arguments: object) -> str:
    """The card that a conversion writes."""
    words = ["convert", str(src), str(dst), "--experts", "4", "--top-k", "2", *map(str, arguments)]
    done = moeify_command(*words)
    assert done.exit_code == 0, done.output
    card = (dst / "README.md").read_text()
    ModelCard(card)  # the hub's own reader takes it
    return card


def card_of(src: Path, config: MoEConfig = CONFIG, target: str = "auto", **arguments: Any) -> str:
    with open_source(src) as source:
        dense = DenseCheckpoint(source)
        return model_card(dense, plan_checkpoint(dense, config, target=target), "moe", **arguments)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return tiny.save(tiny.build("llama"), tmp_path / "src")


def test_the_card_of_a_native_conversion(src: Path, tmp_path: Path) -> None:
    source = "---\nlicense: other\nlicense_name: ours\nlanguage: [en, no]\ntags: [chat, moe]\n"
    (src / "README.md").write_text(source + "base_model: org/base\nmetrics: [x]\n---\n# The dense model\n")
    dst = tmp_path / "a moe"
    card = convert(src, dst)
    assert front_of(card) == {
        "base_model": ["org/base"], "language": ["en", "no"], "library_name": "transformers", "license": "other",
        "license_name": "ours", "tags": ["moe", "mixture-of-experts", "moeify", "chat"],
    }  # fmt: skip
    command = shlex.join(["moeify", "convert", str(src), str(dst), "--experts", "4", "--top-k", "2"])
    assert f"\n    {command}\n" in card and f"'{dst}'" in command
    loaded: Any = moeify.load(dst)
    assert f"| parameters | {loaded.num_parameters():,} (dense" in card
    record = json.loads((dst / "moeify.json").read_text())["verification"]
    assert f"| relative | {record['relative']:.4g} |" in card and "| passed | yes |" in card
    for words in ("llama → mixtral", "3 of 3", "4, of which a token visits 2", "| router | softmax |",
                  "from transformers import MixtralForCausalLM", "output_router_logits = True"):  # fmt: skip
        assert words in card
    assert "import moeify" not in card and "The dense model" not in card


def test_the_card_of_a_conversion_in_moeify_format(src: Path) -> None:
    card = card_of(src, MoEConfig(4, 2, method="drop", router="sigmoid", shared_experts=1), "moeify")
    for words in ("import moeify  # pip install moeify", "moeify.register()", "from transformers import LlamaForCausal",
                  "| shared experts | 1 |", "| method | drop (share=0.5) |", "sigmoid (n\\_group=",
                  "It was not compared", "trains balanced"):  # fmt: skip
        assert words in card
    assert "base_model" not in front_of(card)
    assert "moeify.aux_loss(model)" in card_of(src, MoEConfig(4, 2, attach_losses=False))
    assert "No balancing loss" in card_of(src, MoEConfig(4, 2, aux_loss=0.0), "moeify")
    assert "promises no equality" in card_of(src, MoEConfig(4, 2, method="drop"), verification={"relative": 1.0})


def test_the_proof_is_told_whatever_its_keys_are(src: Path) -> None:
    proof = {"layers": {"worst_one": 1.5e-7, "each": [1, 2]}, "passed": False, "none": None, "about": "x|<b>"}
    card = card_of(src, verification=proof)
    assert "| layers, worst one | 1.5e-07 |" in card and "| passed | no |" in card and "each" not in card
    assert "| about | x\\|\\<b\\> |" in card


@pytest.mark.parametrize(
    ("folder", "base"),
    [
        ("models--org--name/snapshots/0123", "org/name"),
        ("models--gpt2/snapshots/0123", "gpt2"),
        ("models--org--<b>/snapshots/0123", None),
        ("snapshots/0123", None),
    ],
)
def test_a_path_in_the_cache_of_the_hub_names_the_base_model(tmp_path: Path, folder: str, base: str | None) -> None:
    card = card_of(tiny.save(tiny.build("llama"), tmp_path / folder))
    assert front_of(card).get("base_model") == base
    assert (f"made from [{base}](https://huggingface.co/{base})" in card) == (base is not None)
    assert "<b>" not in card


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff" * 99,
        b"---\n" + b"[" * 100_000 + b"\n---\n",
        b"---\nlicense: mit\nlicense: mit\n---\n",
        b"---\n- license\n---\n",
        b"---\nlicense: mit",
        b"---\nlicense: mit\n" + b"#" * YAML_BYTES + b"\n---\n",
        b"---\nlicense: mit\n---\n" + b"x" * CARD_BYTES,
    ],
)
def test_a_damaged_card_of_the_source_gives_nothing(src: Path, damage: bytes) -> None:
    (src / "README.md").write_bytes(damage)
    with open_source(src) as source:
        assert source_metadata(source) == {}
    assert set(front_of(card_of(src))) == {"library_name", "tags"}


def test_a_card_that_leads_outside_or_is_no_file_is_not_read(src: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("---\nlicense: secret\n---\n")
    (src / "README.md").symlink_to(tmp_path / "secret")
    assert "secret" not in card_of(src)
    (src / "README.md").unlink()
    (src / "README.md").mkdir()
    assert "license" not in front_of(card_of(src))


def test_nothing_in_a_card_of_the_source_ends_ours_or_becomes_markup(src: Path) -> None:
    lines = [
        'license: "mit\\n---\\n# Owned"',
        'language: ["en\\u0007", {a: b}, "fr"]',
        f"pipeline_tag: {'x' * 101}",
        'tags: ["a\\n---\\n<script>", "<script>", "b: c", "- d", "---"]',
        'base_model: ["../..", "a/b/c", "o/n"]',
    ]
    (src / "README.md").write_text("\n".join(["---", *lines, "---", ""]))
    card = card_of(src, command="moeify convert a\n```\n<script>\x1b[31m")
    front = front_of(card)
    assert front["base_model"] == ["o/n"] and front["language"] == ["fr"]
    assert front["tags"][3:] == ["<script>", "b: c", "- d", "---"]
    assert not {"license", "pipeline_tag"} & set(front)
    body = card.split("\n---\n", 1)[1]
    assert "Owned" not in card and "\x1b" not in card
    assert [line for line in body.splitlines() if "<script>" in line] == ["    <script>\\x1b[31m"]


def test_a_resumed_conversion_has_the_same_card(src: Path, tmp_path: Path) -> None:
    card = convert(src, tmp_path / "moe")
    (tmp_path / "moe").rename(tmp_path / "first")
    assert convert(src, tmp_path / "moe", "--resume") == card
    assert not re.search(r"\d{4}-\d\d-\d\d", card), "a date would differ"
