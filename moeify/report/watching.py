"""One forward pass of a model, and what its routers did in it.

Shape legend: B sequences, L positions, T = B·L tokens, E experts, K choices per token, V `vocab_size`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.contract.found import FoundLayer, find_layers
from moeify.contract.track import track
from moeify.layers import MoELayer
from moeify.layers.forward_record import ForwardRecord
from moeify.proving.proof import run
from moeify.report.about import short
from moeify.report.data import OVERLOADED, LayerRouting, LayerWeights, Pair, PassageLayer
from moeify.report.weights import MATRIX, rounded
from moeify.training.stats import LayerStats, routing_stats

_PAIRS = 5  # of experts that are shown, of a layer
PASSAGE = 120  # tokens


@dataclass(frozen=True)
class Watched:
    """What was seen.

    Attributes:
        perplexity: None where the model predicts no text.
        routing: Of each layer that chooses.
        passage: What the layers chose for the first tokens.
        weights: Of each layer whose experts can be compared.
        notes: What the reader must know.
    """

    perplexity: float | None
    routing: tuple[LayerRouting, ...]
    passage: tuple[PassageLayer, ...]
    weights: tuple[LayerWeights, ...]
    notes: tuple[str, ...] = ()


def watch(
    model: nn.Module, inputs: Mapping[str, object], compare: Callable[[FoundLayer], LayerWeights | None]
) -> Watched:
    """Run a model and look at its MoE layers; their weights are compared while they are in memory.

    Args:
        model: The model, in evaluation mode.
        inputs: Arguments of its forward.
        compare: What to do with the weights of a layer.

    Raises:
        VerificationError: It gives no logits.
        MoeifyError: A router's logits hold a NaN.
    """
    weights: dict[str, LayerWeights | None] = {}

    def look(layer: FoundLayer, *_: object) -> None:
        if layer.path not in weights:
            weights[layer.path] = compare(layer)

    with ExitStack() as hooks:
        hooks.callback(track(model).remove)
        for path, layer in find_layers(model).items():
            hooks.callback(model.get_submodule(path).register_forward_hook(partial(look, layer)).remove)
        logits, layers = run(model, inputs), find_layers(model)
        chooses = any(not isinstance(layer.state, MoELayer) or layer.state.chooses for layer in layers.values())
        stats = routing_stats(model) if chooses else {}
        records = {path: record for path in stats if (record := layers[path].record) is not None}
        routing = tuple(_routing(path, stats[path], record) for path, record in records.items())
        passage = tuple(_passage(path, record) for path, record in records.items() if _fits(record, inputs))
    notes = () if chooses else ("its tokens choose no experts (soft routing), so no routing is shown",)
    compared = tuple(found for found in weights.values() if found is not None)
    return Watched(perplexity(logits, inputs), routing, passage, compared, notes)


def perplexity(logits_BLV: Tensor, inputs: Mapping[str, object]) -> float | None:
    """Return exp of the mean negative log-likelihood per token, of a causal language model; None of any other.

    Args:
        logits_BLV: What it gave.
        inputs: With `input_ids`, and a mask where some are padding.
    """
    ids_BL, mask_BL = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids_BL, Tensor) or "decoder_input_ids" in inputs or logits_BLV.shape[:-1] != ids_BL.shape:
        return None
    total, count = 0.0, 0
    for row, (ids_L, logits_LV) in enumerate(zip(ids_BL, logits_BLV, strict=True)):
        real = int(mask_BL[row].sum()) if isinstance(mask_BL, Tensor) else len(ids_L)
        if real > 1:
            total += F.cross_entropy(logits_LV[: real - 1].float(), ids_L[1:real], reduction="sum").item()
            count += real - 1
    return short(math.exp(min(total / count, 700))) if count else None


@torch.no_grad()
def _routing(path: str, stats: LayerStats, record: ForwardRecord) -> LayerRouting:
    experts, ids_TK, logits_TE = len(stats.load), record.routing.expert_ids_TK, record.routing.logits_TE
    if record.mask_T is not None:
        ids_TK, logits_TE = ids_TK[record.mask_T], logits_TE[record.mask_T]
    load = tuple(short(share * experts) for share in stats.load)
    chosen_TE = F.one_hot(ids_TK, experts + 1)[..., :experts].sum(1).clamp(max=1).float()
    both_EE = chosen_TE.t() @ chosen_TE
    of_each = both_EE / both_EE.diagonal().clamp(min=1)[:, None]
    together = ids_TK.shape[-1] > 1
    return LayerRouting(
        name=path,
        experts=experts,
        top_k=ids_TK.shape[-1] if stats.choices == stats.tokens * ids_TK.shape[-1] else None,
        choices=stats.choices,
        load=load,
        entropy=short(stats.entropy / math.log(experts)) if experts > 1 else 0.0,
        dropped=short(stats.dropped / max(stats.choices, 1)),
        idle=tuple(number for number, times in enumerate(load) if times == 0),
        overloaded=tuple(number for number, times in enumerate(load) if times > OVERLOADED),
        logit_size=short(stats.logit_size),
        logit_max=short(float(logits_TE.abs().max())) if logits_TE.numel() else 0.0,
        losses={name: short(value) for name, value in stats.losses.items()},
        together=rounded(of_each) if together and experts <= MATRIX else (),
        pairs=_pairs(both_EE, stats.tokens, ids_TK.shape[-1]) if together else (),
    )


def _pairs(both_EE: Tensor, tokens: int, top_k: int) -> tuple[Pair, ...]:
    """Return the experts that are chosen together most above chance, of those that are chosen together at all.

    Chance is the product of their shares of the tokens, times (K - 1) E / (K (E - 1)): the second choice is another
    expert than the first. Where all are chosen evenly and by themselves it is 1 for each pair.
    """
    experts, alone_E = len(both_EE), both_EE.diagonal()
    even = (top_k - 1) * experts / (top_k * (experts - 1))
    lift_EE = both_EE * tokens / (alone_E[:, None] * alone_E).clamp(min=1) / even
    first, second = torch.triu_indices(experts, experts, offset=1)
    lifts = lift_EE[first, second]
    order = lifts.argsort(descending=True, stable=True)[:_PAIRS].tolist()
    return tuple(Pair(int(first[n]), int(second[n]), short(float(lifts[n]))) for n in order if lifts[n] > 0)


def _fits(record: ForwardRecord, inputs: Mapping[str, object]) -> bool:
    """Return whether a layer saw the tokens that the model was called with, one after the other."""
    ids = inputs.get("input_ids")
    return isinstance(ids, Tensor) and len(record.routing.expert_ids_TK) == ids.numel()


def _passage(path: str, record: ForwardRecord) -> PassageLayer:
    ids_TK, weights_TK = record.routing.expert_ids_TK[:PASSAGE], record.routing.weights_TK[:PASSAGE].detach().float()
    experts, weights = [], []
    none = record.routing.scores_TE.shape[-1]
    for ids, values in zip(ids_TK.tolist(), weights_TK.tolist(), strict=True):
        chosen = sorted(((value, number) for number, value in zip(ids, values, strict=True) if number < none),
                        key=lambda choice: (-choice[0], choice[1]))  # fmt: skip
        experts.append(tuple(number for _, number in chosen))
        weights.append(tuple(round(value, 3) for value, _ in chosen))
    return PassageLayer(path, tuple(experts), tuple(weights))
