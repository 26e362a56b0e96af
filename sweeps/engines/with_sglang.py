"""SGLang's loader: its kernels need a GPU, but its models are built, and their weights loaded, without one.

Every weight is no number before. What the loader leaves so, an engine would run with; what it passes over is missing
in the sum of squares. Packages that loading does not use have stand-ins.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sweeps.engines.program import MODEL, main
from sweeps.engines.stand_ins import StandIns

UNUSED = ("orjson", "IPython", "torchvision", "gguf", "flashinfer", "sgl_kernel")


def start() -> None:
    """Let SGLang believe that it serves a model on one CPU."""
    sys.meta_path.append(StandIns(UNUSED))
    context: Any = import_module("sglang.srt.runtime_context")
    arguments = context.get_context().override_server_args(device="cpu").install()
    context.publish(arguments, role="scheduler", ranks=context.SpawnRanks(world_rank=0, gpu_id=0))
    state: Any = import_module("sglang.srt.distributed.parallel_state")
    place = f"file://{tempfile.mkdtemp()}/rendezvous"
    state.init_distributed_environment(1, 0, place, 0, "gloo")
    state.initialize_model_parallel("gloo")
    import_module("sglang.srt.layers.dp_attention").initialize_dp_attention(arguments)


def stored(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a checkpoint."""
    for file in sorted(path.glob("*.safetensors")):
        with import_module("safetensors").safe_open(file, "pt") as opened:
            yield from ((name, opened.get_tensor(name)) for name in list(opened.keys()))


def model_class(architecture: str) -> Any:
    """Return SGLang's class.

    Raises:
        ValueError: It has none, or serves it inside of another only.
    """
    folder = Path(import_module("sglang").__file__ or "").parent / "srt/models"
    for file in sorted(folder.glob("*.py")):
        if f"\nclass {architecture}(" in file.read_text():
            module: Any = import_module(f"sglang.srt.models.{file.stem}")
            served = module.EntryClass if isinstance(module.EntryClass, list) else [module.EntryClass]
            if getattr(module, architecture) in served:
                return getattr(module, architecture)
    raise ValueError(f"{architecture} is not supported")


def loaded(name: str, tensor: Any) -> Any:
    """Return what a loader must make of a tensor: a state's decay from its logarithm, the others as they are."""
    return -tensor.float().exp() if name.endswith(("mamba.A_log", "mixer.A_log")) else tensor


def squares(tensor: Any) -> float:
    """Return the sum of squares."""
    return float(tensor.double().square().sum())


def measure(folder: Path) -> float:
    """Load a checkpoint; return the relative difference of the squares' sums.

    Raises:
        ValueError: The loader leaves weights as they were.
    """
    torch: Any = import_module("torch")
    torch.set_default_dtype(torch.float32)
    config: Any = import_module("transformers").AutoConfig.from_pretrained(folder / MODEL)
    own: Any = import_module("sglang.srt.utils.hf_transformers.common")._CONFIG_REGISTRY
    if config.model_type in own:
        config = own[config.model_type].from_pretrained(folder / MODEL)
    model = model_class(config.architectures[0])(config=config)
    weights = {name: held for name, held in model.named_parameters() if held.is_floating_point()}
    for held in weights.values():
        held.data.fill_(float("nan"))
    model.load_weights(stored(folder / MODEL))
    left = [name for name, held in weights.items() if held.isnan().any()]
    if left:
        raise ValueError(f"its loader leaves {', '.join(left)} as memory has them")
    sums = {name: squares(loaded(name, tensor)) for name, tensor in stored(folder / MODEL)}
    if "lm_head.weight" in weights.keys() - sums.keys():  # a tied head, which the loader copies
        sums["lm_head.weight"] = sums["model.embed_tokens.weight"]
    expected = sum(sums.values())
    return abs(sum(map(squares, weights.values())) - expected) / expected


if __name__ == "__main__":
    start()
    main(measure, version("sglang"))
