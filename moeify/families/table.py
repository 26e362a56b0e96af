"""The native formats that a dense checkpoint can become, and whether it would be exact in them.

A source that fails a condition of a family is refused with that condition, never converted into something that is only
close.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from importlib import import_module

from moeify.config import MoEConfig
from moeify.errors import RefusedError
from moeify.families import targets
from moeify.families.base import Config, Family, Pair, Rewrite, dense_layers, expert_size, layer_count, layer_number
from moeify.families.conditions import LANGUAGE_MODEL
from moeify.families.words import MOEIFY, NATIVE, check_target
from moeify.plan import Plan

FAMILIES: dict[str, Family] = {name: import_module(f"{targets.__name__}.{name}").FAMILY for name in NATIVE}
# What no native format can hold: it routes without a limit, and trains with its own balancing loss.
_UNSAID = (
    "capacity_factor", "eval_capacity_factor", "balance", "divide_loss_by_top_k", "balance_level", "z_loss",
    "attach_losses", "jitter", "expert_dropout",
)  # fmt: skip
_DEFAULTS = MoEConfig(1, 1)


def fit_target(plan: Plan, config: Config, wanted: str, suits: Callable[[Plan], bool] = lambda plan: True) -> Plan:
    """Return the plan for a checkpoint format; it gets the format's router in place of the default one.

    Args:
        plan: What is converted.
        config: The dense config, defaults filled in.
        wanted: "auto" (of the native families that are exact the one that most engines run, else "moeify"), "moeify",
            or a family's model type.
        suits: What else "auto" asks of a plan for a native family.

    Raises:
        ConfigError: There is no such family.
        RefusedError: The wanted family would not be exact; the message says which condition fails.
    """
    check_target(wanted)
    if wanted == MOEIFY:
        return replace(plan, target=MOEIFY)
    if wanted == "auto":
        exact = [family for family in FAMILIES.values() if not why_not(family, plan, config)]
        portable = [family for family in exact if not family.sources[plan.model_type].only]
        suitable = [family for family in portable if suits(_fitted(family, plan))]
        best = max(suitable, key=lambda family: _worth(family, plan), default=None)
        return replace(plan, target=MOEIFY) if best is None else _fitted(best, plan)
    reason = why_not(FAMILIES[wanted], plan, config)
    if reason:
        raise RefusedError(f"--to {wanted} would not be exact for this {plan.model_type}: {reason}")
    return _fitted(FAMILIES[wanted], plan)


def _worth(family: Family, plan: Plan) -> tuple[int, bool, bool]:
    """Return what "auto" compares: engines, then whether tensors stay as they are, then whether no expert is idle."""
    return len(family.engines), not family.sources[plan.model_type].rewrites, family.idle is None


def _fitted(family: Family, plan: Plan) -> Plan:
    is_default = plan.config.router == _DEFAULTS.router
    chosen = family.router if is_default else plan.config.router
    return replace(plan, target=family.model_type, config=replace(plan.config, router=chosen))


def why_not(family: Family, plan: Plan, config: Config) -> str | None:
    """Return the first condition that a source fails for a family, None when the conversion is exact."""
    pair = family.sources.get(plan.model_type)
    if pair is None:
        return f"{family.model_type} can be made from {', '.join(family.sources)}"
    for condition in (LANGUAGE_MODEL, *pair.conditions):
        if not condition.holds(config):
            return condition.otherwise
    return next(_unfit(family, _fitted(family, plan), config), None)


def _unfit(family: Family, plan: Plan, config: Config) -> Iterator[str]:
    """Yield what of a plan a family cannot hold."""
    name, settings = family.model_type, plan.config
    if site := next(_odd_sites(family, plan), None):
        yield site
    if left := _misplaced(family, plan, config):
        yield left
    if not settings.renormalize and family.renormalizes:
        yield f"{name} always renormalizes the weights of the chosen experts"
    if settings.shared_experts and not family.shared:
        yield f"{name} has no place for shared_experts = {settings.shared_experts}; moeify format holds it"
    router = settings.router
    if router.name != family.router:
        yield f"{name} has no place for router = {router.name!r}; moeify format holds it"
    for option in fields(router):
        value = getattr(router, option.name)
        if value != option.default and option.name not in family.options:
            yield f"{name} has no place for router.{option.name} = {value!r}; moeify format holds it"
    for field in _UNSAID:
        if (value := getattr(settings, field)) != getattr(_DEFAULTS, field):
            yield f"{name} has no place for {field} = {value!r}; moeify format holds it"


def _odd_sites(family: Family, plan: Plan) -> Iterator[str]:
    """Yield why FFNs are none that experts of a family can compute."""
    expected = family.sources[plan.model_type].activation
    for site in plan.sites:
        if site.gated != family.gated and family.gated:
            yield f"its activation at {site.path} has no name here, so it is not known which projection is the gate"
        elif site.gated != family.gated:
            yield f"the FFN at {site.path} has a gate, and the experts of {family.model_type} have none"
        elif site.activation != expected:
            yield f"its activation is {site.activation}, and engines compute {expected} whatever the config says"
        if site.up_bias or site.down.bias:
            yield f"the FFN at {site.path} has biases, and the experts of {family.model_type} have none"


def _misplaced(family: Family, plan: Plan, config: Config) -> str | None:
    """Return why the layers that stay dense do not fit a family, None if they do."""
    dense, converted = dense_layers(plan, config), sorted(map(layer_number, plan.sites))
    if not dense or family.dense == "any":
        return None
    if family.dense == "none":
        return f"{len(dense)} of its layers stay dense, and every layer of {family.model_type} is an MoE"
    in_a_row = converted == list(range(converted[0], converted[-1] + 1))
    if not in_a_row or (family.dense == "first" and converted[-1] + 1 < layer_count(config)):
        where = "the first layers" if family.dense == "first" else "layers at the beginning and at the end"
        return f"in {family.model_type} only {where} can stay dense"
    return None


def rewrites(plan: Plan, name: str) -> Rewrite | None:
    """Return what a plan's target stores in place of a dense tensor, with its names; None for that tensor as it is."""
    pair = FAMILIES[plan.target].sources[plan.model_type] if plan.target != MOEIFY else Pair()
    for rewrite in pair.rewrites:
        if found := re.fullmatch(rewrite.pattern, name):
            return replace(rewrite, parts={found.expand(part): compute for part, compute in rewrite.parts.items()})
    return None


def traits(plan: Plan) -> list[str]:
    """Return what a native family has that the dense model has not."""
    family = FAMILIES[plan.target]
    found = [] if family.router == _DEFAULTS.router.name else [f"{plan.target} has a {family.router} router"]
    if family.idle is not None and not plan.config.shared_experts:
        size = family.idle or expert_size(plan)
        found.append(
            f"{plan.target} insists on a shared expert: each layer gets one of intermediate size {size} that outputs "
            "zeros until it is trained"
        )
    return found


def remarks(plan: Plan, config: Config) -> list[str]:
    """Return what a user must know of a folder in a native family: its traits, and what engines do with it.

    Args:
        plan: What is converted.
        config: The config of the dense model or of the MoE, defaults filled in.
    """
    if plan.target == MOEIFY:
        return []
    family = FAMILIES[plan.target]
    notes = (note.otherwise for note in family.notes if not note.holds(config))
    return [*traits(plan), *filter(None, (family.sources[plan.model_type].only, *notes))]
