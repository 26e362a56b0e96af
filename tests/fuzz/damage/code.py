"""Code of somebody else beside a model; none of it may run."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

MARKER = "code_ran"
NAMES = ("evil.Evil", "evil--evil.Evil", "x/y--evil.Evil", "../evil.Evil", "evil", "", 3, None, ["evil.Evil", None])


def planted(rng: Random, path: Path) -> str:
    """Code that the config, the tokenizer or a processor names; the answer to every question is yes."""
    folder = path if path.is_dir() else path.parent
    for name in ("evil.py", "configuration_llama.py", "modeling_llama.py", "tokenization_evil.py"):
        (folder / name).write_text(
            f"open({str(folder.parent / MARKER)!r}, 'w').close()\nopen({MARKER!r}, 'w').close()\nclass Evil: ...\n"
        )
    value = rng.choice(NAMES)
    autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor")
    entries = {"auto_map": {auto: value for auto in autos}}
    files = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")
    chosen = rng.sample(files, rng.randint(1, len(files)))
    for name in chosen:
        file = folder / name
        data = json.loads(file.read_text()) if file.exists() else {}
        if rng.random() < 0.3:
            data["model_type" if name == "config.json" else "tokenizer_class"] = "evil"
        if rng.random() < 0.2:
            data["custom_pipelines"] = {"text-generation": {"impl": "evil.Evil", "pt": ["AutoModel"]}}
        if rng.random() < 0.2:
            data["custom_generate"] = data["attn_implementation"] = "evil/evil"
        file.write_text(json.dumps({**data, **entries}))
    return f"auto_map is {value!r} in {', '.join(chosen)}"
