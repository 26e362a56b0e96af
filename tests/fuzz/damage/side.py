"""Damage of the files beside the weights: tokenizer, generation settings, texts, and `moeify.json`."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

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


_MODULES = ("", "model", "lm_head", "model.layers.0", "model.layers.0.self_attn", "model.layers.9.mlp", "x\nError: y")
_ROUTERS: tuple[object, ...] = ("hash", "soft", "expert_choice", "gshard", {"name": "sigmoid"}, {}, "no such", None)


def other_plan(rng: Random, src: Path) -> str:
    """A plan that is well formed, and is that of another model: in `moeify.json`, in the config, or in both."""
    plan = json.loads((src / "moeify.json").read_text())
    said = _change_plan(rng, plan)
    if rng.random() < 0.7:
        (src / "moeify.json").write_text(json.dumps(plan))
    config = json.loads((src / "config.json").read_text())
    if "moeify" in config and rng.random() < 0.7:
        saved = config["moeify"]["plan"]
        saved |= {name: plan[name] for name in saved if name in plan}
        (src / "config.json").write_text(json.dumps(config))
    return f"a plan with other {said}"


def _change_plan(rng: Random, plan: dict[str, Any]) -> str:
    sites, one = plan["sites"], rng.choice(plan["sites"])
    match said := rng.choice(("experts", "top_k", "path", "parameter", "sites", "version", "shape", "router")):
        case "experts" | "top_k":
            plan["config"][said] = rng.choice((1, 2, 4, 8192, 10**9))
        case "path":
            one["path"] = rng.choice(_MODULES)
        case "parameter":
            rng.choice([one["down"], *one["ups"]])["parameter"] = rng.choice(("lm_head.weight", "x", "", "a\nb"))
        case "sites":
            plan["sites"] = rng.choice(([*sites, one], sites[1:], sites[::-1], [one], [], [one, one]))
        case "version":
            plan["moeify"] = rng.choice((0, 1, 99, "2", None))
        case "shape":
            part = rng.choice((one, one["down"], *one["ups"]))
            for name in [name for name, value in part.items() if type(value) is int]:
                part[name] = rng.choice((part[name], 0, 1, part[name] + 1, 2 * part[name], 2**40, -1))
        case _:
            plan["config"]["router"] = rng.choice(_ROUTERS)
    return said
