"""Everything that a report on a model says, gathered from its files and from one run of it on a text."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Unpack

from torch import Tensor

from moeify import __version__
from moeify.checkpoint.source import Accepted, Source, open_source
from moeify.contract.found import FoundLayer, find_layers
from moeify.conversion.dense import DenseCheckpoint
from moeify.errors import RefusedError
from moeify.hub.loading import load_structure
from moeify.hub.streaming import load_streamed, whole_if_needed
from moeify.plan import Plan
from moeify.proving.proof import plainly, run
from moeify.proving.whole import verify_checkpoints
from moeify.report.about import conversion_of, costs_of, engines_of, plan_of, proof_of, recorded_proof, size_of
from moeify.report.data import LayerWeights, Report, Text
from moeify.report.findings import findings
from moeify.report.text import Tokens, tokens_for
from moeify.report.watching import Watched, perplexity, watch
from moeify.report.weights import distances, weights_of

_DOES_NOT_RUN = "the model does not run"


def collect(
    src: str,
    dense: str | None = None,
    *,
    text: str | None = None,
    text_name: str = "the text",
    **accepted: Unpack[Accepted],
) -> Report:
    """Look at an MoE, run it on a text, and compare it with its dense model where that is given.

    Args:
        src: A model folder, a GGUF file or a hub id.
        dense: The dense model that it was made from.
        text: What to run it on; None takes one that is there.
        text_name: What the text is called.
        accepted: As for `open_source`; a model's own code is not run here either.

    Raises:
        RefusedError: It has no MoE layer.
        MoeifyError: A model cannot be read, or does not run.
    """
    opening = partial(open_source, **accepted)
    with ExitStack() as opened:
        source, *others = (opened.enter_context(opening(at)) for at in (src, dense) if at is not None)
        origin = DenseCheckpoint(others[0]) if others else None
        report, plan = _about(src, source, origin)
        watched, tokens = _run(source, plan, origin, text, text_name)
        before = None if origin is None or not tokens.is_text else _perplexity(origin.source, tokens)
        if origin is not None:
            said = text if tokens.is_text else None
            proof = verify_checkpoints(origin.source.path, source.path, text=said, **accepted).to_dict()
            report = replace(report, proofs=(*report.proofs, proof_of("now", proof)))
    after = watched.perplexity if tokens.is_text else None
    ran = Text(tokens.source, tokens.count, after, before, tokens.passage, watched.passage)
    notes = (*tokens.notes, *watched.notes)
    report = replace(report, text=ran, routing=watched.routing, weights=watched.weights, notes=notes)
    return replace(report, findings=findings(report))


def _about(name: str, source: Source, origin: DenseCheckpoint | None) -> tuple[Report, Plan | None]:
    """Return what is known without running the model, and its plan."""
    model = load_structure(source)
    layers = find_layers(model)
    if not layers:
        raise RefusedError(f"{name} has no MoE layer to report on: convert it first, or look at it with moeify inspect")
    plan, cast_to = plan_of(source)
    recorded = recorded_proof(source)
    dense = None if origin is None else size_of(origin.source, origin.model, find_layers(origin.model))
    report = Report(
        title=Path(name).name or name,
        version=__version__,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        model_type=source.model_type,
        engines=engines_of(source, plan),
        layers=tuple(layer.to_dict() for layer in layers.values()),
        conversion=None if plan is None else conversion_of(plan, model.config.to_dict(), cast_to),
        costs=costs_of(layers, size_of(source, model, layers), dense),
        proofs=() if recorded is None else (recorded,),
    )
    return report, plan


def _run(
    source: Source, plan: Plan | None, origin: DenseCheckpoint | None, text: str | None, name: str
) -> tuple[Watched, Tokens]:
    """Run the MoE, with a few layers in memory at a time where that can be."""
    compare = partial(_compare, plan, origin)

    def attempt(whole: bool) -> tuple[Watched, Tokens]:
        model, _ = load_streamed(source, lambda _: None, whole=whole, unused=True, **plainly(source))
        tokens = tokens_for(source, model, text, name)
        return watch(model, tokens.inputs, compare), tokens

    return whole_if_needed(attempt, _DOES_NOT_RUN)


def _compare(plan: Plan | None, origin: DenseCheckpoint | None, layer: FoundLayer) -> LayerWeights | None:
    def read(name: str) -> Tensor:
        assert origin is not None
        return origin.source.read(origin.info(name).name).float()

    return weights_of(layer, None if plan is None or origin is None else distances(layer, plan, read))


def _perplexity(dense: Source, tokens: Tokens) -> float | None:
    def attempt(whole: bool) -> float | None:
        model, _ = load_streamed(dense, lambda _: None, whole=whole, unused=True)
        return perplexity(run(model, tokens.inputs), tokens.inputs)

    return whole_if_needed(attempt, _DOES_NOT_RUN)
