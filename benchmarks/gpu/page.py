"""Write docs/gpu.md from the records of a run on a GPU: `python -m benchmarks.gpu.page [RESULTS]`.

RESULTS is the folder that a run left; its records become docs/gpu.jsonl. Without it the page is written from what is
there, and says that nothing was measured if nothing is.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.gpu import summary
from benchmarks.gpu.onnx import summary as onnx
from benchmarks.gpu.run import Record, read_records

ROOT = Path(__file__).resolve().parents[2]
PAGE, RECORDS = ROOT / "docs/gpu.md", ROOT / "docs/gpu.jsonl"
SECTIONS = {
    "The machine, and its ceilings": summary.about,
    "Checks against float64": summary.checks,
    "What failed": summary.failures,
    "The experts of a layer": summary.layers,
    "A few tokens, launched and as a CUDA graph": summary.decoding,
    "Training steps of whole models": summary.training,
    "Single kernels": summary.kernels,
    "Tiles": summary.tuning,
    "Exported files in onnxruntime-gpu": onnx.lines,
}
HEAD = """\
# On a GPU

Made by `python -m benchmarks.gpu.page` from the records in `docs/gpu.jsonl`.
"""
NOTHING = """\
**Not measured yet.** No kernel of moeify has run on a GPU: they are compiled, their machine code is read
([kernels.md](kernels.md)), and they compute right in Triton's interpreter. Exported files were placed by
onnxruntime-gpu with stubs of CUDA ([where](../benchmarks/gpu/onnx/place.md)), which compute nothing.
"""
HOW = """\
## How to run it

```
bash benchmarks/gpu/prepare.sh onnx       # here: what the other machine lacks goes into .whl/, 40 MB
bash benchmarks/gpu/run.sh                # there: the kernels, 8 minutes at most; no network is needed
bash benchmarks/gpu/run.sh onnx           # there: exported files, 4 minutes at most
python -m benchmarks.gpu.page gpu_results # here, with the folder that came back
```

Every stage has a limit and writes each result at once ([what they are](../benchmarks/README.md)).
`bash benchmarks/gpu/run.sh --dry` goes through all of them without a GPU.
"""


def page(records: list[Record]) -> str:
    """Return the page of some records.

    Raises:
        SystemExit: they are of a dry run, or of a run that did not say where it ran.
    """
    if not records:
        return f"{HEAD}\n{NOTHING}\n{HOW}"
    versions = next((record for record in records if record["what"] == "versions"), None)
    if versions is None or versions.get("dry", True):
        raise SystemExit("these records are not of a GPU: run the stage env on one first")
    card = next((record["name"] for record in records if record["what"] == "gpu"), "a GPU")
    parts = [f"{HEAD}\nOn {card}, of commit {versions.get('commit') or 'unknown'}.\n"]
    for title, lines in SECTIONS.items():
        text = "\n".join(lines(records))
        if text:
            parts.append(f"## {title}\n\n```\n{text}\n```\n")
    return "\n".join([*parts, HOW])


def main(arguments: list[str]) -> None:
    """Take over the records of a run, if one is named, and write the page."""
    if arguments:
        results = Path(arguments[0])
        page(read_records(results))
        shutil.copyfile(results / "results.jsonl", RECORDS)
    PAGE.write_text(page(read_records(RECORDS.parent, RECORDS.name)))


if __name__ == "__main__":
    main(sys.argv[1:])
