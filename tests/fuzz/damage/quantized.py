"""Damage of what says how weights are computed: the settings of a quantization, or of an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from tests.fuzz.damage import files, jsons


def settings(rng: Random, src: Path) -> str:
    """An entry of the quantization_config is another value."""
    path = src / "config.json"
    config = json.loads(path.read_text())
    names = ("bits", "group_size", "quant_method", "checkpoint_format", "weight_block_size", "config_groups", "version")
    said = jsons.mutate(rng, config["quantization_config"], names)
    path.write_text(json.dumps(config))
    return f"in the quantization_config, {said}"


def adapter(rng: Random, src: Path) -> str:
    """An entry of an adapter's config is another value, or its text is damaged."""
    path = src / "adapter_config.json"
    names = ("use_dora", "bias", "alpha_pattern", "rank_pattern", "revision", "modules_to_save")
    return files.of_text(rng, path) if rng.random() < 0.2 else jsons.of_values(rng, path, names)
