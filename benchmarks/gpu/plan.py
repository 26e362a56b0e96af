"""The stages, in the order of their value, with the seconds that each may take: nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

KERNELS = ("up", "rows", "down_backward", "weights", "bias", "combine", "count", "place", "tile_map")
_SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis")
_NCU = (
    "ncu", "--clock-control", "none", "--target-processes", "all", "-c", "6",
    "-k", f"regex:{'|'.join(f'{name}_kernel' for name in KERNELS[:4])}",
    *(word for section in _SECTIONS for word in ("--section", section)),
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A stage is a process of its own.

    Attributes:
        name: As it is asked for.
        seconds: It is stopped after them.
        function: Where it is: "module.function" in `benchmarks.gpu`.
        beside: A stage that compiles on other cores meanwhile.
        tool: A program of NVIDIA's that runs it, with arguments; such a stage is left out of a dry run.
        environment: Variables of its process.
    """

    name: str
    seconds: int
    function: str
    beside: str = ""
    tool: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def _sanitizer(tool: str) -> tuple[str, ...]:
    filters = (word for name in KERNELS for word in ("--kernel-name", f"kernel_substring={name}_kernel"))
    return "compute-sanitizer", "--tool", tool, "--print-limit", "20", "--target-processes", "all", *filters


_UNCACHED = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # so that every tensor has an end that the tool can see
STAGES = {
    stage.name: stage
    for stage in (
        # No launch-bound number is taken while others compile.
        Stage("env", 60, "stages.environment.stage", beside="warm"),
        Stage("check", 70, "stages.check.stage", beside="warm_tiles"),
        Stage("kernels", 45, "stages.kernels.stage"),
        Stage("layers", 110, "stages.layers.stage"),
        Stage("decode", 45, "stages.decode.stage"),
        Stage("quantized", 30, "stages.quantized.stage"),
        Stage("train", 85, "stages.train.stage"),
        Stage("tune", 65, "stages.tune.stage"),
        Stage("tuned", 20, "stages.tune.tuned"),
        Stage("memcheck", 45, "stages.tools.every_height", tool=_sanitizer("memcheck"), environment=_UNCACHED),
        Stage("racecheck", 45, "stages.tools.every_height", tool=_sanitizer("racecheck"), environment=_UNCACHED),
        Stage("ncu", 60, "stages.tools.step", tool=_NCU),
        Stage("onnx_env", 25, "onnx.environment.stage"),
        Stage("onnx_pool", 70, "onnx.pool.stage"),
        Stage("onnx_layers", 32, "onnx.layers.stage"),
        Stage("onnx_decoders", 30, "onnx.decoders.stage"),
        Stage("onnx_compile", 25, "onnx.layers.compiled"),
        Stage("onnx_big", 20, "onnx.layers.big"),
        Stage("warm", 75, "stages.warm.layers"),
        Stage("warm_tiles", 75, "stages.warm.tiles"),
    )
}
GROUPS = {
    "kernels": (
        "env",
        "check",
        "kernels",
        "layers",
        "decode",
        "quantized",
        "train",
        "tune",
        "tuned",
        "memcheck",
        "racecheck",
        "ncu",
    ),
    "onnx": ("onnx_env", "onnx_pool", "onnx_layers", "onnx_decoders", "onnx_compile", "onnx_big"),
}
BUDGET = 470  # seconds for all the stages that are asked for
