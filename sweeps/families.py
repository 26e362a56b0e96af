"""Convert every dense source into every native family that says it is exact, and write docs/families.json and .md.

    python -m sweeps.families [SOURCE...]                    measures every pair (minutes), or those of some sources
    python -m sweeps.families --older PYTHON [SOURCE...]     loads the outputs in another environment: transformers 4
    python -m sweeps.families --page                         only writes the page

The output is loaded by transformers alone; a tensor that is missing or unexpected is an error. With experts that are
copies its logits are compared with the dense model's, with experts that differ with those of the same plan carried out
in place, which knows nothing of native formats.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import Output, convert_checkpoint, plan_checkpoint
from moeify.conversion.dense import DenseCheckpoint
from moeify.conversion.module import put_layers
from moeify.errors import RefusedError
from moeify.families.base import TRANSFORMERS
from moeify.families.table import FAMILIES
from moeify.measure import relative_difference
from moeify.methods.noise import Noise
from moeify.plan import Plan
from sweeps.dense_sources import SOURCES, build
from sweeps.engines.record import right_engines
from sweeps.models import DOCS

# Formats that look as if they could be made from a dense model, and why they are not among the families.
LEFT_OUT = (
    "llama4_text, from Llama: its router multiplies the *input* of an expert by a sigmoid s, and E(s·x) ≠ s·E(x) for "
    "an FFN with a gate, so no expert that holds the dense FFN is exact. The only exact Llama 4 keeps the dense FFN as "
    "its shared expert beside experts whose down projections are zeros: none of its experts is made of the dense FFN, "
    "and that is not a conversion.",
    "Gemma 2 and 3: norms before and after attention and FFN, with two rotary bases or a soft cap. The one MoE format "
    "with these norms, Gemma 4, normalizes values too, and does not scale attention.",
)
RESULTS, PAGE = DOCS / "families.json", DOCS / "families.md"
NOISE = MoEConfig(experts=4, top_k=2, method=Noise(std=0.3))
TOKENS = torch.randint(3, 101, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    """Return the logits on the same tokens for every model."""
    result: Tensor = model(input_ids=tokens).logits
    return result


def load_stock(folder: Path) -> nn.Module:
    """Load a checkpoint with transformers alone; whatever its model lacks or has no place for is an error."""
    auto: Any = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True, experts_implementation="eager")
    left = {kind: found for kind, found in info.items() if found}
    if left:
        raise ValueError(f"the output does not fit {type(model).__name__}: {left}")
    found: nn.Module = model.eval()
    return found


class Measured:
    """A dense source, traced once, whose conversions are measured.

    Args:
        model: The model.
        folder: Where its checkpoint and those made of it are written.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder
        model.save_pretrained(folder / "src")
        with open_source(folder / "src") as source:
            self.dense = DenseCheckpoint(source)
            _ = self.dense.regions

    def convert(self, target: str, config: MoEConfig, layers: str = "all") -> Plan:
        """Convert into a family, to `dst` in the folder.

        Raises:
            RefusedError: It would not be exact.
        """
        plan = plan_checkpoint(self.dense, config, layers, target)
        convert_checkpoint(self.dense, plan, Output(self.folder / "dst", 10**9, overwrite=True))
        return plan

    def difference(self, target: str, config: MoEConfig, layers: str = "all", tokens: Tensor = TOKENS) -> float:
        """Convert into a family, and return how far the result is from what it must compute.

        Raises:
            RefusedError: It would not be exact.
            ValueError: The output does not fit the family's model in transformers.
        """
        plan, expected = self.convert(target, config, layers), self.model
        if not config.exact:
            expected = copy.deepcopy(self.model)
            put_layers(expected, plan, self.dense.regions)
        return relative_difference(logits(load_stock(self.folder / "dst"), tokens), logits(expected, tokens))


def measure(name: str, source: Measured) -> dict[str, Any]:
    """Return what was measured of one source, or why it is refused, by family."""
    found: dict[str, Any] = {}
    for target in (target for target, family in FAMILIES.items() if SOURCES[name][0] in family.sources):
        try:
            configs = {"copies": replace(NOISE, method="copy"), "differing": NOISE}
            found[target] = {kind: float(f"{source.difference(target, of):.1e}") for kind, of in configs.items()}
        except RefusedError as error:
            found[target] = {"refused": str(error).partition(": ")[2]}
    return found


def measure_again(name: str, before: dict[str, Any]) -> dict[str, Any]:
    """Return what is measured of one source now, with what an older transformers said of it before."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(name, Measured(build(name), Path(folder)))
    kept = {target: {"older": pair["older"]} for target, pair in before.items() if "older" in pair}
    return {target: {**pair, **kept.get(target, {})} for target, pair in found.items()}


def measure_older(python: str, results: dict[str, dict[str, Any]]) -> None:
    """Load every exact output in another environment; add what it says to the results, under its version."""
    with tempfile.TemporaryDirectory() as room:
        for name, pairs in results.items():
            with tempfile.TemporaryDirectory() as folder:
                source = Measured(build(name), Path(folder))
                for target in (target for target, found in pairs.items() if "refused" not in found):
                    source.convert(target, NOISE)
                    place = Path(room, f"{name}, {target}")
                    shutil.copytree(source.folder / "dst", place / "dst")
                    expected = {"tokens": TOKENS, "logits": logits(load_stock(place / "dst")).contiguous()}
                    save_file(expected, place / "expected.safetensors")
        command = [python, str(Path(__file__).with_name("older_transformers.py")), room]
        said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for place, difference in said["found"].items():
        name, _, target = place.rpartition(", ")
        results[name][target]["older"] = {said["transformers"]: difference}


def page(results: dict[str, dict[str, Any]]) -> str:
    """Return the document."""
    text = [
        "# Native families",
        "",
        "`moeify convert` writes these formats of transformers where they compute exactly what the dense model does:",
        "nothing of moeify is needed to load them. `--to auto` takes the exact one that most engines run, and",
        "`moeify families SRC` says which are exact for a checkpoint. Engines that know a format but compute it",
        "otherwise are left out. Those that were run are in [engines.md](engines.md); with a star they are wrong in",
        "some corners of the config, which it names. That others know a format is from their own registries. Written",
        "by `python -m sweeps.families`.",
        "",
        "| family | made from | layers that can stay dense | router | shared experts | engines, run | others |",
        "|---|---|---|---|---|---|---|",
        *(_family_row(name) for name in FAMILIES),
        "",
        "## Measured",
        "",
        "Tiny random models in float32, 4 experts, top-2. *copies*: the largest difference of a logit from the dense",
        "model's, relative to the largest logit. *differing*: experts with noise, compared with the same plan carried",
        "out in place. *transformers 4*: these outputs loaded there, compared with the transformers that is installed;",
        "above 1e-5 it computes something else there. What is refused is told with its reason. Further corners are",
        "drawn at random by `python -m sweeps.corners`, which keeps docs/corners.json.",
        "",
        "| source | family | copies | differing | transformers 4 |",
        "|---|---|--:|--:|--:|",
        *(_row(source, target, found) for source, pairs in results.items() for target, found in pairs.items()),
        "",
        "## Left out",
        "",
        *(f"- {reason}" for reason in LEFT_OUT),
    ]
    return "\n".join(text) + "\n"


def _family_row(name: str) -> str:
    family = FAMILIES[name]
    shared = "any number" if family.shared else "-"
    if family.idle is not None:
        shared += f"; else an idle one{f' of size {family.idle}' if family.idle else ''}"
    notes = [
        *(note.otherwise for note in family.notes),
        *dict.fromkeys(f"from {source}: {pair.only}" for source, pair in family.sources.items() if pair.only),
    ]
    run = right_engines(name)
    starred = [engine if always else f"{engine}*" for engine, always in run.items()]
    others = ", ".join(engine for engine in family.engines if engine not in {*run, TRANSFORMERS})
    return (
        f"| {name} | {', '.join(family.sources)} | {family.dense} | {family.router} | {shared} "
        f"| {', '.join([TRANSFORMERS, *starred])} | {others}{''.join(f'. Note: {note}' for note in notes if note)} |"
    )


def _row(source: str, target: str, found: dict[str, Any]) -> str:
    if "refused" in found:
        return f"| {source} | {target} | refused: {found['refused']} | | |"
    older = [_older(version, said) for version, said in found.get("older", {}).items()]
    return f"| {source} | {target} | {found['copies']:.1e} | {found['differing']:.1e} | {', '.join(older)} |"


def _older(version: str, said: float | str) -> str:
    if isinstance(said, float):
        return f"{version}: {said:.1e}" if said < 1e-5 else f"{version}: **{said:.1e}**"
    return f"{version} does not know it" if "does not recognize this architecture" in said else f"{version}: {said}"


def main() -> None:
    """Measure what is asked for; write the record and the page."""
    match sys.argv[1:]:
        case ["--page"]:
            pass
        case ["--older", python, *names]:
            results = json.loads(RESULTS.read_text())
            measure_older(python, {name: results[name] for name in names or results})
            write(results)
        case names:
            known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            for name in names or SOURCES:
                known[name] = measure_again(name, known.get(name, {}))
                print(name, json.dumps(known[name]), flush=True)
            write({name: known[name] for name in SOURCES})
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


def write(results: dict[str, dict[str, Any]]) -> None:
    """Write the record, a line for each source."""
    lines = [f"{json.dumps(name)}: {json.dumps(found)}" for name, found in results.items()]
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
