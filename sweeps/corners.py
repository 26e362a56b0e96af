"""Draw corners of the dense configs, convert into every family that says it is exact, and write docs/corners.json.

    python -m sweeps.corners [--seed 0] [--models 350]      ten minutes

What is drawn are fields besides those of a source: heads, biases, windows, rotary positions, activations. A model that
transformers itself does not run is drawn again. Exit code 1 if a conversion is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from moeify.errors import MoeifyError, RefusedError, first_line
from moeify.families.table import FAMILIES
from moeify.measure import TOLERANCE
from sweeps.dense_sources import SOURCES, build
from sweeps.families import NOISE, Measured, logits
from sweeps.models import DOCS

RECORD = DOCS / "corners.json"
# More tokens than windows and the first lengths of rotary positions.
TOKENS = torch.randint(3, 101, (2, 100), generator=torch.Generator().manual_seed(1))
# Each with how often it is drawn; a source that has the field already, or a type that lacks it, keeps what it has.
FIELDS: dict[str, tuple[float, tuple[Any, ...]]] = {
    "tie_word_embeddings": (0.4, (True, False)),
    "head_dim": (0.2, (8, 16)),
    "num_key_value_heads": (0.4, (1, 4)),
    "attention_bias": (0.25, (True, False)),
    "attention_out_bias": (0.1, (True,)),
    "mlp_bias": (0.25, (True,)),
    "use_bias": (0.25, (True,)),
    "hidden_act": (0.1, ("gelu", "gelu_pytorch_tanh", "relu", "swish")),
    "hidden_activation": (0.1, ("gelu", "silu")),
    "rms_norm_eps": (0.25, (1e-3,)),
    "norm_eps": (0.25, (1e-3,)),
    "layer_norm_eps": (0.25, (1e-3,)),
    "use_qk_norm": (0.25, (True,)),
    "logit_scale": (0.25, (0.5, 2.0)),
    "logits_scaling": (0.25, (1.0, 8.0)),
    "residual_multiplier": (0.25, (0.3, 1.0)),
    "embedding_multiplier": (0.25, (1.0, 12.0)),
    "attention_multiplier": (0.25, (0.1, 1.0)),
    "attention_dropout": (0.25, (0.1,)),
}
_LENGTH = {"original_max_position_embeddings": 64}
_SCALED = {"factor": 4.0, **_LENGTH}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 5e4},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": _SCALED,
    "llama3": {**_SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": _SCALED,
}
# Gemma 4 is exact but for epsilon (see its family); the others have rotary positions for each kind of layer.
_NOT_DRAWN, _KINDS_OF_ROPE = {"gemma4_text"}, {"cohere2", "olmo3", "qwen3_5_text"}


def draw(name: str, rng: random.Random) -> dict[str, Any]:
    """Return fields for a source, besides its own."""
    model_type, own = SOURCES[name]
    known = transformers.AutoConfig.for_model(model_type).to_dict().keys() - own.keys()
    rates = {field: (rate, values) for field, (rate, values) in FIELDS.items() if field in known}
    if "kv_lora_rank" in own:
        rates.pop("num_key_value_heads", None)
    found = {field: rng.choice(values) for field, (rate, values) in rates.items() if rng.random() < rate}
    if "sliding_window" in known and rng.random() < 0.4:
        found |= _windows(known, rng)
    if "rope_parameters" in known and model_type not in _KINDS_OF_ROPE and rng.random() < 0.5:
        found |= _rope({**own, **found}, rng)
    return found


def _windows(known: set[str], rng: random.Random) -> dict[str, Any]:
    if "use_sliding_window" in known:
        found = {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": rng.randint(0, 2)}
        return {field: value for field, value in found.items() if field in known}
    kinds = [rng.choice(("sliding_attention", "full_attention")) for _ in range(2)]
    return {"sliding_window": 7, **({"layer_types": kinds} if "layer_types" in known else {})}


def _rope(fields: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    kind = rng.choice(sorted(ROPES))
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
    if kind == "default" and rng.random() < 0.5:
        rope["partial_rotary_factor"] = 0.5
    if kind != "longrope":
        return {"rope_parameters": rope}
    half = (fields.get("qk_rope_head_dim") or fields.get("head_dim") or 8) // 2
    return {"rope_parameters": {**rope, "short_factor": [1.1] * half, "long_factor": [2.0] * half}, **_LENGTH}


def check(name: str, model: nn.Module) -> dict[str, str]:
    """Return what came of each family: "exact", "refused", or what is wrong."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Measured(model, Path(folder))
        for target in (target for target, family in FAMILIES.items() if SOURCES[name][0] in family.sources):
            try:
                configs = (replace(NOISE, method="copy"), NOISE)
                worst = max(source.difference(target, config, tokens=TOKENS) for config in configs)
                found[target] = "exact" if worst <= TOLERANCE["float32"] else f"{worst:.1e}"
            except RefusedError:
                found[target] = "refused"
            except (MoeifyError, ValueError, RuntimeError) as error:
                found[target] = first_line(error)
    return found


def run(seed: int, models: int) -> dict[str, Any]:
    """Draw models and check them; return the record."""
    rng, counts, wrong = random.Random(seed), {"exact": 0, "refused": 0}, []
    names = [name for name, (model_type, _) in SOURCES.items() if model_type not in _NOT_DRAWN]
    done = 0
    while done < models:
        name = rng.choice(names)
        fields = draw(name, rng)
        try:
            model = build(name, **fields)
            logits(model, TOKENS)
        except Exception:
            continue
        done += 1
        for target, said in check(name, model).items():
            if said in counts:
                counts[said] += 1
            else:
                wrong.append({"source": name, "fields": fields, "family": target, "what": said})
                print(json.dumps(wrong[-1]), flush=True)
    return {"seed": seed, "models": models, **counts, "wrong": wrong}


def main(arguments: Sequence[str]) -> int:
    """Run, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=int, default=350)
    given = parser.parse_args(arguments)
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    record = run(given.seed, given.models)
    RECORD.write_text(json.dumps(record) + "\n")
    print(json.dumps({**record, "wrong": len(record["wrong"])}))
    return 1 if record["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
