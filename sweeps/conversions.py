"""The ways in which a model is converted, each held to the dense model's outputs."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import moeify
from moeify.checkpoint.source import open_source
from moeify.conversion.checkpoint import Callbacks, Output, convert_checkpoint, plan_checkpoint
from moeify.conversion.dense import DenseCheckpoint
from moeify.errors import MoeifyError
from moeify.layers import SparseMoE
from moeify.measure import TOLERANCE, relative_difference
from sweeps.small_model import Small

CONFIG = moeify.MoEConfig(experts=4, top_k=2)
Outputs = list[Tensor]


def check_paths(small: Small) -> dict[str, Any]:
    """Return the result of each way: a relative difference, or a reason."""
    folder = Path(tempfile.mkdtemp(prefix="exactness"))
    try:
        paths = _Paths(small, folder)
        ways = {"in place": paths.in_place, "stored": paths.stored, "auto": paths.auto,
                "streamed": paths.streamed, "graph": paths.graph}  # fmt: skip
        for name, way in ways.items():
            paths.attempt(name, way)
        return paths.results
    finally:
        shutil.rmtree(folder)


@dataclass
class _Paths:
    """One model and its results so far.

    Attributes:
        small: The dense model.
        folder: For checkpoints.
        results: By name.
        converted: The model that was converted in place; None when it was refused.
    """

    small: Small
    folder: Path
    results: dict[str, Any] = field(default_factory=dict)
    converted: Any = None

    def __post_init__(self) -> None:
        self.expected = run(self.small.model, self.small.inputs)
        repeated = difference(run(self.small.model, self.small.inputs), self.expected)
        if repeated:
            self.results["dense, repeated"] = repeated
        if not all(bool(torch.isfinite(t).any()) for t in self.expected if t.is_floating_point()):
            self.results["dense"] = "has an output without a finite value"

    def attempt(self, name: str, way: Callable[[], Any]) -> None:
        """Keep what a way returns: a refusal is a result, any other error is a defect."""
        try:
            result = way()
        except MoeifyError as error:
            result = f"refused: {' '.join(str(error).split())}"[:400]
        except Exception as error:
            result = f"ERROR {type(error).__name__}: {' '.join(str(error).split())}"[:400]
        if result is not None:
            self.results[name] = result

    def in_place(self) -> Any:
        """Convert a copy; when that is refused it must be as it was."""
        model = copy.deepcopy(self.small.model)
        before, state = repr(model), {name: t.clone() for name, t in model.state_dict().items()}
        config = self.small.model.config.to_dict()
        try:
            moeify.convert(model, CONFIG, example_inputs=self.small.example_inputs)
        except MoeifyError:
            same = repr(model) == before and same_tensors(model.state_dict(), state) is None
            if not same or model.config.to_dict() != config:
                self.results["refused and changed"] = True
            raise
        self.converted = model
        layers = {name: m for name, m in model.named_modules() if isinstance(m, SparseMoE)}
        self.results["ffns"] = len(layers)
        result = difference(run(model, self.small.inputs), self.expected)
        if result > TOLERANCE["float32"]:
            self.results["in place, float64"] = self.in_float64()
        idle = [name for name, layer in layers.items() if layer.record is None]
        if idle:
            self.results["not reached"] = f"{len(idle)}, {idle[0]}"
            result = max(result, self.directly(idle))
        return result

    def in_float64(self) -> float:
        """Convert in float64: a model that sorts or rounds what it computes makes much of the last digit."""
        dense = copy.deepcopy(self.small.model).double()
        inputs = {name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
                  for name, value in self.small.inputs.items()}  # fmt: skip
        expected = run(dense, inputs)
        moeify.convert(dense, CONFIG, example_inputs=self.small.example_inputs and inputs)
        return difference(run(dense, inputs), expected)

    @torch.no_grad()
    def directly(self, paths: list[str]) -> float:
        """Compare layers that the inputs do not reach with the modules that they replaced."""
        worst = 0.0
        plan = {site["path"]: site for site in self.converted.config.moeify["plan"]["sites"]}
        for path in paths:
            x = torch.randn(2, 7, plan[path]["hidden"])
            chain, ours = [*plan[path]["bypassed"], path], path
            if plan[path]["handing"]:  # the block around them computes the rest
                ours = os.path.commonpath([inner.replace(".", "/") for inner in chain]).replace("/", ".")
                chain = [ours]
            y: Any = x
            try:
                for inner in chain:
                    y = self.small.model.get_submodule(inner)(y)
            except Exception as error:
                self.results["not compared"] = f"{path}: {type(error).__name__}"
                continue
            worst = max(worst, difference([self.converted.get_submodule(ours)(x)], [y]))
        return worst

    def stored(self) -> Any:
        """Save the converted model and load it."""
        if self.converted is None:
            return None
        self.converted.save_pretrained(self.folder / "stored")
        return self.loaded(self.folder / "stored")

    def loaded(self, folder: Path) -> Any:
        """Load a converted checkpoint, which must hold the in-place model's tensors."""
        model = moeify.load(folder)
        if self.converted is not None:
            unequal = same_tensors(model.state_dict(), self.converted.state_dict())
            if unequal:
                return f"UNEQUAL {unequal}"
        return difference(run(model, self.small.inputs), self.expected)

    def auto(self) -> Any:
        """Load with transformers' AutoModel, which drops a head and may add a pooler."""
        import transformers

        if self.converted is None or not isinstance(self.results.get("stored"), float):
            return None
        moeify.register()
        base = getattr(self.converted, self.converted.base_model_prefix, self.converted)
        mapping: Any = transformers.AutoModel._model_mapping
        if type(self.converted.config) not in mapping or mapping[type(self.converted.config)] is not type(base):
            return None
        model = transformers.AutoModel.from_pretrained(self.folder / "stored")
        result, expected = model.state_dict(), base.state_dict()
        unequal = same_tensors({name: result[name] for name in expected if name in result}, expected)
        return f"UNEQUAL {unequal}" if unequal else "equal"

    def streamed(self) -> Any:
        """Save the dense model and convert its checkpoint."""
        dense, moe = self.folder / "dense", self.folder / "moe"
        self.small.model.save_pretrained(dense)
        shutil.rmtree(self.folder / "stored", ignore_errors=True)
        try:
            again = moeify.load(dense)
        except Exception as error:
            return f"transformers does not load what it saved ({type(error).__name__}: {' '.join(str(error).split())})"[
                :300
            ]
        own = difference(run(again, self.small.inputs), self.expected)
        if own > 1e-6:
            self.results["dense, saved and loaded"] = own
        del again
        unused: list[str] = []
        with open_source(dense) as source:
            opened = DenseCheckpoint(source, self.small.example_inputs)
            plan = plan_checkpoint(opened, CONFIG, target="moeify")
            convert_checkpoint(opened, plan, Output(moe, shard_size=10**10), Callbacks(unused=unused.extend))
        if unused:
            self.results["unused"] = f"{len(unused)}, {unused[0]}"
        return self.loaded(moe)

    def graph(self) -> Any:
        """Export the dense model and convert the graph."""
        inputs = self.small.inputs
        try:
            with torch.no_grad():  # else what a model computes without gradients is set apart
                program = torch.export.export(self.small.model, (), inputs, strict=False)
            same = difference(run(program.module(), inputs), self.expected)
        except Exception as error:
            return f"torch.export: {type(error).__name__}: {' '.join(str(error).split())}"[:160]
        if same > 1e-6:
            self.results["exported"] = same
        converted = moeify.convert_graph(program, CONFIG)
        self.results["graph ffns"] = sum(isinstance(m, SparseMoE) for m in converted.modules())
        return difference(run(converted, inputs), self.expected)


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any]) -> Outputs:
    """Return every tensor that a model returns, with the same random numbers each time."""
    torch.manual_seed(0)
    inputs = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return [leaf.clone() for leaf in pytree.tree_leaves(model(**inputs)) if isinstance(leaf, Tensor)]


def difference(result: Outputs, expected: Outputs) -> float:
    """Return the largest relative difference of any output; infinite when they do not correspond."""
    if [t.shape for t in result] != [t.shape for t in expected]:
        return float("inf")
    return max((_relative(a, b) for a, b in zip(result, expected, strict=True)), default=0.0)


def _relative(result: Tensor, expected: Tensor) -> float:
    if not expected.is_floating_point():
        return 0.0 if torch.equal(result, expected) else 1.0
    finite = torch.isfinite(expected)  # some models mask with infinities
    if not torch.equal(finite, torch.isfinite(result)):
        return float("inf")
    return relative_difference(result[finite], expected[finite])


def same_tensors(result: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """Return the first name under which two state dicts differ, None when they are equal bit for bit."""
    names = set(result) ^ set(expected)
    if names:
        name = min(names)
        return f"{len(names)} names, {'extra' if name in result else 'missing'} {name}"
    for name, tensor in expected.items():
        other = result[name]
        if other.dtype != tensor.dtype or other.shape != tensor.shape or not torch.equal(_bits(other), _bits(tensor)):
            return f"{name} {tuple(other.shape)} {other.dtype}"
    return None


def _bits(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor) if tensor.is_floating_point() else tensor
