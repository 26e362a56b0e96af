"""ONNX Runtime: which version is installed, and sessions that use the provider that was asked for."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from moeify.errors import CheckpointError, ConfigError, MoeifyError, VerificationError, first_line, told_as

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_BEST_FIRST = ("cuda", "cpu")
_SUFFIX = "ExecutionProvider"


def runtime_version() -> str:
    """Return the version of the ONNX Runtime that is installed, whichever package brought it."""
    version: str = import_module("onnxruntime").__version__
    return version


def check_runtime(minimum: tuple[int, ...]) -> None:
    """Raise if the installed ONNX Runtime is older than `minimum`.

    Raises:
        MoeifyError: it is.
    """
    installed = tuple(int(part) for part in runtime_version().split(".")[:2])
    if installed < minimum:
        need = ".".join(map(str, minimum))
        raise MoeifyError(
            f"onnxruntime {runtime_version()} is too old: {need} or newer is needed; pip install -U onnxruntime"
        )


def open_session(path: Path, *, provider: str | None = None, threads: int = 0) -> InferenceSession:
    """Open a session and make sure that it uses the provider that was asked for.

    Args:
        path: The ONNX file.
        provider: "cpu", "cuda" or another of ONNX Runtime's, None for the best of the first two that works.
        threads: Threads inside an operator; 0 lets ONNX Runtime decide.

    Raises:
        MoeifyError: onnxruntime is missing.
        CheckpointError: It does not load the file, or there is no regular file.
        ConfigError: the provider does not work here (ONNX Runtime itself would fall back to the CPU and only log it).
    """
    try:
        onnxruntime = import_module("onnxruntime")
    except ImportError as error:
        raise MoeifyError(
            "running ONNX files needs onnxruntime: pip install onnxruntime, or onnxruntime-gpu"
        ) from error
    if not os.path.isfile(path):  # to open a pipe would wait for ever
        raise CheckpointError(f"{path} is not a file: give an ONNX file")
    known = {name.removesuffix(_SUFFIX).lower(): name for name in onnxruntime.get_all_providers()}
    if provider is not None and provider not in known:
        raise ConfigError(f"provider is {provider!r}: expected one of {', '.join(sorted(known))}")
    wanted = [known[name] for name in (_BEST_FIRST if provider is None else (provider,))]
    available = [name for name in wanted if name in onnxruntime.get_available_providers()]
    if not available:
        raise ConfigError(
            f"this onnxruntime has no {wanted[0]}: install a package that has it, in an environment of its own "
            "(onnxruntime-gpu for cuda)"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    with told_as(f"onnxruntime {runtime_version()} does not load {path}", CheckpointError):
        session: InferenceSession = onnxruntime.InferenceSession(str(path), options, providers=available)
    if provider is not None and session.get_providers()[0] != wanted[0]:
        raise ConfigError(
            f"{wanted[0]} does not work on this machine: onnxruntime fell back to {session.get_providers()[0]}"
        )
    return session


def check_loads(path: Path) -> None:
    """Check that ONNX Runtime accepts a file that its CPU provider may have no kernels for.

    Kernels are looked for after every node and type was accepted; what has none here must satisfy onnx's checker too.

    Raises:
        VerificationError: it does not.
    """
    try:
        open_session(path, provider="cpu")
    except CheckpointError as error:
        cause: BaseException = error.__cause__ or error
        if type(cause).__name__ == "NotImplemented":
            try:
                import_module("onnx.checker").check_model(str(path), full_check=True)
                return
            except Exception as wrong:  # two classes of onnx, and whatever a file of its own raises
                cause = wrong
        raise VerificationError(
            f"the exported file is not one that ONNX Runtime loads: {first_line(cause)}; nothing was written"
        ) from error
