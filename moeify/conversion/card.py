"""The model card of a converted checkpoint, its README.md: what it is made from and how, its proof, how to use it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from huggingface_hub import ModelCardData

from moeify.checkpoint.download import HUB_ID
from moeify.checkpoint.folder import CARD, leads_outside
from moeify.checkpoint.source import Source
from moeify.config.choice import Choice
from moeify.conversion.cost import dense_cost, moe_cost
from moeify.conversion.dense import DenseCheckpoint
from moeify.errors import CheckpointError, printable
from moeify.families.table import FAMILIES
from moeify.families.words import MOEIFY
from moeify.files.limits import CARD_BYTES
from moeify.files.reading import is_file, read_bytes
from moeify.files.yaml_text import parse_yaml
from moeify.names import folded
from moeify.plan import Plan

_TAGS = ("moe", "mixture-of-experts", "moeify")
_FRONT = re.compile(rb"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_MARKUP = re.compile(r"([\\`*_{}\[\]<>#|!&~$])")
_WORD, _WORDS = 100, 100  # characters of a tag or a name, and how many of them are carried over


def model_card(
    dense: DenseCheckpoint, plan: Plan, name: str, verification: object = None, command: str | None = None
) -> str:
    """Return the text of the README.md beside a converted checkpoint.

    What comes from others (the card of the source, names in its config) is escaped, and left out where it is damaged.

    Args:
        dense: The dense checkpoint.
        plan: What was converted.
        name: The output's name.
        verification: What was measured, as `moeify.json` keeps it; None if nothing was.
        command: The command that was typed, if one was.
    """
    front, source = _metadata(dense.source), _base_name(dense.source)
    title = f"{_escaped(name)}\n\nA Mixture-of-Experts (MoE) made from {source} by moeify."
    sections = {
        "What was converted": _table(_facts(dense, plan)),
        "Proof": _proof(verification, exact=plan.config.exact),
        "Load it": _loading(plan, type(dense.model).__name__, name),
        "Train it": _training(plan),
        "How it was made": _making(command),
    }
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    return f"---\n{front.to_yaml()}\n---\n\n# {title}\n\n{body}\n"


def _metadata(source: Source) -> ModelCardData:
    """Return the front matter: ours, and of the source's what stays true of the MoE."""
    card = source_metadata(source)
    base = _hub_id(source.path) or [word for word in _words(card.get("base_model")) if HUB_ID.fullmatch(word)] or None
    return ModelCardData(
        base_model=base,
        language=_words(card.get("language")) or None,
        library_name="transformers",
        license=_word(card.get("license")),
        license_name=_word(card.get("license_name")),
        license_link=_word(card.get("license_link")),
        pipeline_tag=_word(card.get("pipeline_tag")),
        tags=[*_TAGS, *(tag for tag in _words(card.get("tags")) if tag not in _TAGS)],
    )


def source_metadata(source: Source) -> dict[str, object]:
    """Return the front matter of the source's README.md; nothing where there is none, or it cannot be read."""
    folder = source.path.parent if source.path.suffix == ".gguf" else source.path
    card = folder / CARD
    with suppress(CheckpointError, ValueError):
        if is_file(card) and not leads_outside(card, folder):
            front = _FRONT.match(read_bytes(card, CARD_BYTES))
            found = parse_yaml(front[1]) if front else None
            return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}
    return {}


def _words(value: object) -> list[str]:
    """Return the short texts in a field that holds one or a list of them."""
    values = value if isinstance(value, list) else [value]
    texts = [text for text in values if isinstance(text, str) and text.isprintable() and 0 < len(text) <= _WORD]
    return list(dict.fromkeys(texts))[:_WORDS]


def _word(value: object) -> str | None:
    return next(iter(_words(value)), None)


def _hub_id(path: Path) -> str | None:
    """Return the id of a model in the hub's cache: `…/models--org--name/snapshots/…`."""
    for parent in path.absolute().parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            found = parent.parent.name.removeprefix("models--").replace("--", "/")
            return found if HUB_ID.fullmatch(found) else None
    return None


def _base_name(source: Source) -> str:
    found = _hub_id(source.path)
    return f"[{_escaped(found)}](https://huggingface.co/{found})" if found else f"a {_escaped(source.model_type)} model"


def _facts(dense: DenseCheckpoint, plan: Plan) -> Iterator[tuple[str, str]]:
    config, before, after = plan.config, dense_cost(dense), moe_cost(dense, plan)
    paths = folded(site.path for site in plan.sites)
    yield "architecture", f"{plan.model_type} → {plan.target if plan.target != MOEIFY else 'moeify format'}"
    yield "FFNs", f"{len(plan.sites)} of {len(dense.inspection.ffns)}: {paths}"
    yield "experts", f"{config.experts}, of which a token visits {config.top_k}"
    yield "method", _choice(config.method)
    yield "granularity", str(config.granularity)
    yield "shared experts", str(config.shared_experts)
    yield "router", _choice(config.router)
    yield "parameters", f"{after.parameters:,} (dense: {before.parameters:,})"
    yield "active parameters per token", f"{after.active:,} (dense: {before.active:,})"


def _choice(choice: Choice) -> str:
    options = ", ".join(f"{name}={value}" for name, value in choice.to_dict().items() if name != "name")
    return f"{choice.name} ({options})" if options else choice.name


def _proof(verification: object, *, exact: bool) -> str:
    if not isinstance(verification, Mapping):
        return "It was not compared with the dense model. `moeify verify DENSE THIS` does it."
    promise = "Experts and router are made so that it computes what the dense model computes, up to rounding."
    jump = "This method promises no equality with the dense model: the numbers say how far it jumped."
    measured = _table((name, _number(value)) for name, value in _leaves(verification))
    return f"{promise if exact else jump} Measured when it was written:\n\n{measured}"


def _leaves(record: Mapping[object, object], before: str = "") -> Iterator[tuple[str, object]]:
    """Yield the numbers and words of a record, those of records inside it too, but no lists."""
    for key, value in record.items():
        name = f"{before}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}, ")
        elif isinstance(value, bool | int | float | str):
            yield name, value


def _number(value: object) -> str:
    words = {True: "yes", False: "no"}
    return words[value] if isinstance(value, bool) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _loading(plan: Plan, dense_class: str, name: str) -> str:
    native = plan.target != MOEIFY
    architecture = FAMILIES[plan.target].architecture if native else dense_class
    where = repr(name)
    stock = [f"from transformers import {architecture}", f"model = {architecture}.from_pretrained({where})"]
    if native:
        return f"It is a model of transformers, which needs nothing of moeify:\n\n{_code(stock)}"
    ours = ["import moeify  # pip install moeify", f"model = moeify.load({where})"]
    registered = ["import moeify", "moeify.register()", *stock]
    return f"{_code(ours)}\n\nor, as every model of transformers:\n\n{_code(registered)}"


def _training(plan: Plan) -> str:
    config = plan.config
    if plan.target != MOEIFY:
        return (
            "The experts are equal at first, and nothing balances them until it is asked for: set "
            "`model.config.output_router_logits = True` before training (or use `moeify.RoutingCallback(trainer)`), "
            f"and `router_aux_loss_coef`, here {config.aux_loss:g}, comes into the loss."
        )
    if not (config.aux_loss or config.z_loss):
        return "No balancing loss is asked for: look at `moeify.routing_stats(model)` while it trains."
    if not config.attach_losses:
        return "Add the balancing loss to yours: `loss = loss + moeify.aux_loss(model)`."
    return (
        "An unchanged script trains balanced: the balancing loss comes with the loss that the model returns, in its "
        "gradients. `moeify.routing_stats(model)` shows how the experts are used."
    )


def _making(command: str | None) -> str:
    record = "`moeify.json` holds the whole plan, for `moeify convert --plan`, and the proof."
    return f"{_code(command.split(chr(10)))}\n\n{record}" if command else record


def _code(lines: Iterable[str]) -> str:
    """Return an indented block, which nothing inside can end."""
    return "\n".join(f"    {printable(line)}" for line in lines)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_escaped(name)} | {_escaped(value)} |" for name, value in rows)])


def _escaped(text: str) -> str:
    return _MARKUP.sub(r"\\\1", printable(text))
