"""Damage of the files beside the weights: tokenizer, generation settings, texts, and `moeify.json`."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.fuzz.damage import files, jsons

JSONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
TEXTS = ("LICENSE", "README.md", "merges.txt", "vocab.json", "special_tokens_map.json", "chat_template.jinja",
         "preprocessor_config.json")  # fmt: skip
NAMES = ("eos_token_id", "tokenizer_class", "added_tokens_decoder", "model_max_length", "chat_template", "temperature")


def _change(rng: Random, path: Path) -> str:
    def values(rng: Random, path: Path) -> str:
        return jsons.of_values(rng, path, NAMES)

    return rng.choice((values, values, files.of_text, files.flip, files.in_its_place))(rng, path)


def tokenizer(rng: Random, src: Path) -> str:
    return _change(rng, src / rng.choice(JSONS))


def beside(rng: Random, src: Path) -> str:
    """A file that is carried along, as a link, a pipe or another oddity."""
    path = src / rng.choice(TEXTS)
    path.write_text("{}")
    return files.in_its_place(rng, path)


def record(rng: Random, src: Path) -> str:
    """What moeify wrote of a conversion."""
    return _change(rng, src / "moeify.json")


def plan_in_config(rng: Random, src: Path) -> str:
    """The plan in the config of a checkpoint in moeify format, or any other entry."""
    return jsons.of_values(rng, src / "config.json")
