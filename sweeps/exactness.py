"""Convert every model type that transformers registers, with real weights, and write docs/exactness.json and .md.

    python -m sweeps.exactness              every type that has no result yet (hours, if there are none)
    python -m sweeps.exactness llama t5     some types, again
    python -m sweeps.exactness --page       only write the page

Each type is built small with random weights that make every FFN matter, converted in place, saved and loaded, streamed
from its checkpoint, and converted as a graph. All outputs are compared with the dense model's, state dicts bit for bit.
A type runs in a process of its own, so that a crash or a hang costs one result; what was done is kept and not redone.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from statistics import median
from typing import Any

import torch
import transformers

from benchmarks.measure import key
from benchmarks.record import measured, write
from moeify.measure import TOLERANCE
from sweeps.conversions import check_paths
from sweeps.models import DOCS, model_types
from sweeps.small_model import small_model

RESULTS, PAGE = DOCS / "exactness.json", DOCS / "exactness.md"
WAYS = ("in place", "stored", "streamed", "graph")
CODE = ("moeify/conversion", "moeify/layers", "kernels/cpu.py")
SECONDS = 150  # of CPU time for a type
LIMIT = TOLERANCE["float32"]

Result = dict[str, Any]


def check(model_type: str) -> Result:
    """Build one model type and convert it in every way."""
    logging.disable()
    warnings.simplefilter("ignore")
    transformers_logging: Any = transformers.utils.logging
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    started = time.monotonic()
    try:
        small = small_model(model_type)
    except Exception as error:  # whatever stops a model from being built is the result
        return {"not built": line_of(error)}
    result = {"class": type(small.model).__name__, "parameters": small.parameters, **check_paths(small)}
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def line_of(error: BaseException) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def isolated(model_type: str) -> Result:
    """Run `check` in a fork of this process, for a limited time."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))  # ends the process, as the alarm does
        signal.alarm(5 * SECONDS)
        try:
            result = check(model_type)
        except BaseException:
            result = {"crash": traceback.format_exc()[-1500:]}
        with os.fdopen(writing, "w") as pipe:
            json.dump(result, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if not text:
        ended = os.WTERMSIG(status)
        slow = ended in {signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL}
        return {"crash": f"no result after {SECONDS} s" if slow else f"ended with signal {ended}"}
    found: Result = json.loads(text)
    return found


def results() -> dict[str, Result]:
    """Return what was found before."""
    known: dict[str, Result] = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    return known


def keep(model_type: str, result: Result) -> None:
    """Add one result to the record."""
    known = dict(sorted({**results(), model_type: result}.items()))
    beside = RESULTS.with_suffix(f".{os.getpid()}")
    what = "differences of outputs, relative to the largest, by type of model; types are measured one by one"
    write(measured(what, "the dense models", CODE, summary(known), known), beside)
    beside.replace(RESULTS)


def summary(known: dict[str, Result]) -> dict[str, Any]:
    """Return how many types were built, and for each way of converting how many are exact."""
    built = [result for result in known.values() if "in place" in result]
    found: dict[str, Any] = {"types": len(known), "built": len(built)}
    for way in WAYS:
        numbers = [result[way] for result in built if isinstance(result.get(way), float)]
        within = sum(number <= LIMIT for number in numbers)
        found[key(way)] = {"converted": len(numbers), "within": within, "median": median(numbers or [0.0])}
    return found


def page(known: dict[str, Result]) -> str:
    """Return the document."""
    counts = summary(known)
    text = [
        "# Exactness",
        "",
        "Every model type of docs/architectures.md, built small with random weights in float32 and converted (4",
        "experts, top-2, copies). Numbers are the largest difference of any output from the dense model's, relative to",
        "that output's largest value; the limit is 1e-5. *stored* is what `save_pretrained` wrote and `moeify.load`",
        "read, *streamed* is the conversion from checkpoint to checkpoint, whose tensors equal the in-place ones bit",
        "for bit, *graph* is `convert_graph` on what `torch.export` returned. Where float32 is above the limit, the",
        "number in float64 stands beside it: a model that sorts or rounds what it computes makes much of the last",
        "digit. d_fine, deimv2, pp_doclayout_v3, v4, rt_detr and (mm-)grounding-dino sort queries by scores of which",
        "some tie. Where the unchanged graph of torch.export differs, its difference stands beside the graph's. Where",
        "a model has no forward, or one for a session of a video, the first model inside it stands for it. Written by",
        "`python -m sweeps.exactness`, type by type.",
        "",
        "{types} types: {built} were built, {in_place[converted]} of them convert in place, {in_place[within]} within "
        "the limit.".format(**counts),
        "",
        "| model type | FFNs | in place | stored | streamed | graph |",
        "|---|--:|---|---|---|---|",
    ]
    return "\n".join([*text, *(_row(name, known[name]) for name in sorted(known))]) + "\n"


def _row(name: str, result: Result) -> str:
    if "in place" not in result:
        why = result.get("not built") or result.get("crash", "").strip().split("\n")[-1]
        return f"| {name} | - | {_cell(why)} | | | |"
    ways = [_cell(result.get(way, "")) for way in WAYS]
    if "in place, float64" in result:
        ways[0] += f" (float64: {result['in place, float64']:.1e})"
    if result.get("exported", 0) > LIMIT and isinstance(result["graph"], float):
        ways[3] += f" (torch.export: {result['exported']:.1e})"
    return f"| {name} | {result.get('ffns', '-')} | {' | '.join(ways)} |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" + (" ✗" if value > LIMIT else "")
    return str(value).replace("|", "\\|").replace("\n", " ")[:200]


def main() -> None:
    """Check the named types, or those without a result; write the page."""
    known = results()
    if sys.argv[1:] != ["--page"]:
        check("llama")  # so that no child spends its time on imports
        for name in sys.argv[1:] or [name for name in sorted(model_types()) if name not in known]:
            result = isolated(name)
            keep(name, result)
            print(name, json.dumps(result), flush=True)
    PAGE.write_text(page(results()))


if __name__ == "__main__":
    main()
