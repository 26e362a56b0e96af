"""What is right and what is wrong about the end of a case."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import stat
from pathlib import Path

from huggingface_hub import ModelCard
from yaml import YAMLError

from moeify.cli.quiet import DEBUG
from tests.fuzz.damage.code import MARKER
from tests.fuzz.damage.leftovers import WORK_FOLDER
from tests.fuzz.driver import GROWTH, Outcome

HANDLED, UNFORESEEN, ACCEPTED = "handled", "unforeseen", "accepted"
RIGHT = (HANDLED, ACCEPTED)
WRONG = ("traceback", UNFORESEEN, "hang", "memory", "killed", "not one line", "left behind", "lost or changed",
         "code ran", "broken output")  # fmt: skip
_READ = 10 * 2**20  # bytes of a file that are compared
_NOISE = re.compile(r"Traceback|Warning\b|\[transformers\]|Exception ignored|panicked|site-packages|^\[[WE]:?\d*")
_NO_MEMORY = re.compile(r"MemoryError|can't allocate memory|Cannot allocate memory|bad_alloc", re.IGNORECASE)

State = dict[str, str]


def state_of(folder: Path) -> State:
    """What lies in a folder: names, kinds, and contents."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            found[str(path.relative_to(folder))] = _content(path)
    return found


def _content(path: Path) -> str:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"link to {os.readlink(path)}"
    if not stat.S_ISREG(status.st_mode):
        return stat.filemode(status.st_mode)
    if status.st_size > _READ:
        return f"{status.st_size} bytes, {status.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def judge(outcome: Outcome, before: State, after: State, targets: tuple[str, ...]) -> tuple[str, str]:
    """Return the outcome of a case in a word, and what is wrong.

    Args:
        outcome: What the command did.
        before: What lay in the folder of the case.
        after: What lies there now.
        targets: What the command may make or replace when it succeeds, relative to the folder.
    """
    if MARKER in "".join(set(after) - set(before)):
        return "code ran", "code beside the model ran"
    for wrong in (_killed(outcome), _files(outcome, before, after, targets), _said(outcome)):
        if wrong is not None:
            return wrong
    if outcome.code == 0:
        return ACCEPTED, ""
    return (UNFORESEEN if f"set {DEBUG}=1" in outcome.stderr else HANDLED), ""


def _killed(outcome: Outcome) -> tuple[str, str] | None:
    if outcome.signal in (signal.SIGALRM, signal.SIGXCPU):
        return "hang", f"{outcome.seconds:.0f} s of CPU time, {signal.Signals(outcome.signal).name}"
    if outcome.signal:
        return "killed", signal.Signals(outcome.signal).name
    if outcome.growth > GROWTH or (outcome.code and _NO_MEMORY.search(outcome.stderr)):
        return "memory", f"{outcome.growth / 1e6:.0f} MB more"
    return None


def _files(outcome: Outcome, before: State, after: State, targets: tuple[str, ...]) -> tuple[str, str] | None:
    """Nothing but the output changes, and that only on success."""

    def allowed(name: str) -> bool:
        parts = Path(name).parts
        if WORK_FOLDER in parts and "foreign" not in name:  # what an interrupted run left is moeify's own
            return name in before
        return outcome.code == 0 and any(parts[: len(Path(one).parts)] == Path(one).parts for one in targets)

    changed = [name for name in before if after.get(name) != before[name] and not allowed(name)]
    if changed:
        return "lost or changed", ", ".join(changed)[:200]
    left = [name for name in after if name not in before and not allowed(name)]
    if outcome.code == 0 and targets:
        left += [name for name in after if WORK_FOLDER in Path(name).parts]
    return ("left behind", ", ".join(left)[:200]) if left else None


def wrong_card(card: Path) -> str:
    """What is wrong with a model card, as the hub reads it, and with words of strangers in it."""
    text = card.read_text()
    try:
        tags = vars(ModelCard(text).data).get("tags")
    except (ValueError, YAMLError) as error:
        return f"the hub cannot read the card: {error}"[:200]
    if not isinstance(tags, list) or tags[:1] != ["moe"]:
        return f"the card has the tags {tags!r}"[:200]
    body = text.split("\n---\n", 1)[-1]
    return "the card holds markup of its source" if re.search(r"(?<!\\)<script|\(javascript:", body) else ""


def _said(outcome: Outcome) -> tuple[str, str] | None:
    """An error is one line, the last; nothing of other libraries stands before it, and nothing acts on a terminal."""
    lines = outcome.stderr.split("\n")[:-1]
    if "Traceback" in outcome.stderr or outcome.code not in (0, 1, 2):
        return "traceback", next((line for line in reversed(lines) if line.strip()), f"exit code {outcome.code}")
    strange = [line for line in lines if _NOISE.search(line) or not line.isprintable()]
    strange += [line for line in outcome.stdout.split("\n") if not line.isprintable()]
    if strange:
        return "not one line", strange[0][:200]
    errors = sum(line.startswith("Error: ") for line in lines)
    if outcome.code == 0:
        return ("not one line", "an error, and exit code 0") if errors else None
    if errors != 1 or not lines[-1].startswith("Error: "):
        return "not one line", f"{errors} errors; the last line is {lines[-1] if lines else ''!r}"[:200]
    return None
