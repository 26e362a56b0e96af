"""From what the passes found to a plan: place every FFN, choose layers, name the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter

from torch import fx, nn

from moeify.config import MoEConfig
from moeify.contract.found import FoundLayer, find_layers
from moeify.errors import RefusedError
from moeify.kernels.activations import ACTIVATIONS as KERNELS_KNOW
from moeify.names import folded
from moeify.passes.ffn import FFN, Inspection
from moeify.passes.matching.activation import CUSTOM
from moeify.passes.matching.projection import Projection
from moeify.passes.matching.region import region_parameters, short_names
from moeify.plan import Plan, Rows, Site
from moeify.planning.placement import Placement, Placer
from moeify.planning.selection import is_pattern, select_layers

_REASONS = 3  # in the message that nothing was found


def make_plan(
    model: nn.Module,
    graph_module: fx.GraphModule,
    inspection: Inspection,
    config: MoEConfig,
    layers: str = "all",
    *,
    in_place: bool = True,
) -> Plan:
    """Plan the conversion of the selected FFNs.

    Args:
        model: The model that was traced.
        graph_module: Its graph.
        inspection: What was found in the graph.
        config: The settings.
        layers: A selection (see `moeify.planning.selection`).
        in_place: For the module tree; False for a graph, where every FFN can be replaced.

    Raises:
        RefusedError: No FFN was found, or one of the selected cannot be replaced in place.
        ConfigError: The selection matches nothing.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    if not inspection.ffns:
        raise RefusedError(_is_moe(model_type, find_layers(model)) or _nothing_found(model_type, inspection))
    chosen = select_ffns(layers, inspection.ffns)
    return Plan(model_type, config, plan_sites(model, graph_module, chosen, config, in_place=in_place))


def plan_sites(
    model: nn.Module, graph_module: fx.GraphModule, ffns: Sequence[FFN], config: MoEConfig, *, in_place: bool = True
) -> tuple[Site, ...]:
    """Give each of these FFNs its place, and name its weights (see `make_plan`).

    Raises:
        RefusedError: One cannot be replaced in place, or cannot be cut as the settings ask for.
    """
    placer, parameters = Placer(graph_module), dict(model.named_parameters(remove_duplicate=False))
    for name in (name for ffn in ffns for name in ffn.projected if name not in parameters):
        raise RefusedError(f"{name} is a buffer, not a parameter (quantized?): convert the model before that")
    place = placer.place if in_place else placer.place_in_graph
    sites = tuple(_site(ffn, place(ffn)) for ffn in ffns)
    for path, activation, size in ((site.path, site.activation, site.intermediate) for site in sites):
        if config.granularity > 1 and activation == CUSTOM:
            raise RefusedError(f"{path}: its activation has no name, so it cannot be cut: use granularity 1")
        if size % config.granularity:
            raise RefusedError(f"{path}: its intermediate size {size} does not divide into {config.granularity} shards")
    return sites


def select_ffns(spec: str, ffns: Sequence[FFN]) -> list[FFN]:
    """Return the FFNs that a selection names; shared experts of an MoE only where a regular expression names them.

    Raises:
        RefusedError: All there is are shared experts.
        ConfigError: The selection is malformed or matches nothing.
    """
    dense = [ffn for ffn in ffns if not ffn.shared_expert]
    if spec == "all" and not dense:
        raise RefusedError(
            f"the only dense FFNs are {len(ffns)} shared experts of an MoE ({ffns[0].name}, ...): "
            "name them by a regular expression to convert them"
        )
    offered = ffns if is_pattern(spec) else dense
    return [offered[i] for i in select_layers(spec, [ffn.name for ffn in offered])]


def _is_moe(model_type: str, layers: Mapping[str, FoundLayer]) -> str | None:
    """Say that a model is an MoE already, if it is."""
    for layer in layers.values():
        what = f"{len(layers)} MoE layers ({folded(layers)}), {layer.num_experts} experts each"
        return f"{model_type} is an MoE already: {what}: convert the dense model that it was made from"
    return None


def _nothing_found(model_type: str, inspection: Inspection) -> str:
    reasons = inspection.reasons()
    looked = [f"{folded(names)}: {reason}" for reason, names in list(reasons.items())[:_REASONS]]
    if len(reasons) > _REASONS:
        looked.append(f"and {len(reasons) - _REASONS} more reasons, which moeify inspect lists")
    seen = "; ".join(looked) or "it projects no activation by a parameter"
    return f"no dense FFN was found in {model_type}: {seen}"


def _site(ffn: FFN, place: Placement) -> Site:
    activation = ffn.activation if ffn.activation in KERNELS_KNOW else CUSTOM
    state = short_names(region_parameters(ffn.region)) if activation == CUSTOM else {}
    read = [str(node.target) for node in ffn.region.graph.find_nodes(op="get_attr")] if activation == CUSTOM else []
    if any(name not in state and attrgetter(name)(ffn.region).is_meta for name in read):
        raise RefusedError(f"{place.path}: its activation reads a tensor that no module holds: give it to a module")
    whole = tuple((i, 0, up.out_features, 1) for i, up in enumerate(ffn.ups))
    named = None if activation == CUSTOM else ffn.gate_up_rows
    parts = whole if named is None else named.parts
    return Site(
        path=place.path,
        bypassed=place.bypassed,
        kind=ffn.kind,
        activation=activation,
        hidden=ffn.hidden,
        intermediate=ffn.intermediate,
        ups=tuple(_rows(ffn.ups[i], start, stop, step) for i, start, stop, step in parts),
        down=_rows(ffn.down, 0, ffn.down.out_features, 1),
        dropout=place.dropout,
        expert_dropout=place.expert_dropout,
        activation_state=tuple(state.items()),
        handing=place.handing,
        axis=place.axis,
        rounded=ffn.rounded and activation != CUSTOM,
    )


def _rows(of: Projection, start: int, stop: int, step: int) -> Rows:
    return Rows(of.weight, of.bias, start, stop, step, of.out_features, of.transposed)
