"""PyTorch's own format: payloads that run code, damage, and state dicts that are none."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from random import Random

import torch

from tests.fuzz.damage import files
from tests.fuzz.damage.code import MARKER

NAME = "pytorch_model.bin"


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


def payload(rng: Random, src: Path) -> str:
    path, command = src / NAME, f"touch {src.parent / MARKER}"
    state: dict[str, object] = dict(torch.load(path, weights_only=True))
    match rng.choice(("plain", "in the zip archive", "old format")):
        case "plain":
            path.write_bytes(pickle.dumps(Payload(command)))
        case "in the zip archive":
            state["model.norm.weight"] = Payload(command)
            torch.save(state, path)
        case _:
            torch.save({**state, "x": Payload(command)}, path, _use_new_zipfile_serialization=False)
    return "a payload"


def odd_state(rng: Random, src: Path) -> str:
    """Plain tensors, but not as a model has them."""
    path = src / NAME
    state: dict[object, object] = dict(torch.load(path, weights_only=True))
    name = rng.choice(sorted(map(str, state)))
    whole = state[name]
    assert isinstance(whole, torch.Tensor)
    with warnings.catch_warnings(action="ignore"):  # it is deprecated, and in files that there are
        quantized = torch.quantize_per_tensor(whole, 0.1, 0, torch.quint8)
    odd: dict[str, object] = {
        "on the meta device": whole.to("meta"),
        "repeated to 4 TB": torch.zeros(1).expand(2**40),
        "sparse": whole.to_sparse(),
        "quantized": quantized,
        "transposed": whole.t() if whole.dim() == 2 else whole[None],
        "a number": 3,
        "a list": [whole],
        "a parameter": torch.nn.Parameter(whole),
        "complex": whole.to(torch.complex64),
        "missing": None,
    }
    said = rng.choice((*odd, "under a number", "under bytes", "alone", "of a list"))
    if said in odd:
        state[name] = odd[said]
    elif said.startswith("under"):
        state[3 if said == "under a number" else b"x"] = whole
    torch.save(whole if said == "alone" else [whole] if said == "of a list" else state, path)
    return f"{name} {said}"


def damaged(rng: Random, src: Path) -> str:
    return rng.choice((files.of_bytes, files.of_bytes, files.in_its_place))(rng, src / NAME)


def old_format(rng: Random, src: Path) -> str:
    """The format from before torch 1.6, damaged."""
    path = src / NAME
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    return "old format, " + files.of_bytes(rng, path)
