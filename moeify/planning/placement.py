"""Where in the module tree an FFN can be replaced: the module that is nothing else, or the projections themselves.

Three ways, tried in this order:
    owner      The FFN is a module of its own (`model.layers.0.mlp`): the MoE layer takes its place.
    splice     It is spread over siblings (BERT's `intermediate.dense`, `output.dense`; OPT's `fc1`, `fc2`): the MoE
               layer takes the place of the down projection, and the modules before it pass their input on.
    hand over  Its block computes a part of it, a function or a product: as a splice, but the up projections keep their
               input for the layer, and the block works on zeros (`moeify.layers.hand_over`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import fx

from moeify.errors import RefusedError
from moeify.passes.ffn import FFN
from moeify.passes.matching import dataflow as flow
from moeify.passes.matching.operators import TRANSPARENT, has, op_name
from moeify.passes.matching.projection import Projection
from moeify.passes.matching.region import region_parameters

GRAPH_INSTEAD = "convert the graph instead: moeify.convert_graph(torch.export.export(model, args), config)"


@dataclass(frozen=True)
class Placement:
    """Where the MoE layer of an FFN sits, and what it takes over.

    Attributes:
        path: Where the MoE layer sits.
        bypassed: Modules that pass their input on from now, because the layer does their work.
        dropout: Probability with which the FFN's output is dropped in a module that the layer replaces.
        expert_dropout: Probability with which its hidden layer is dropped.
        handing: Those of `bypassed` that hand their input to the layer, and pass zeros on.
        axis: The dimension of the features, counted from the end.
    """

    path: str
    bypassed: tuple[str, ...]
    dropout: float
    expert_dropout: float
    handing: tuple[str, ...] = ()
    axis: int = -1


class Placer:
    """Finds the places of FFNs in the module tree.

    Args:
        graph_module: The traced graph.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.by_module: dict[str, list[fx.Node]] = {}
        self.static: dict[fx.Node, bool] = {}
        for node in graph_module.graph.nodes:
            if node.op != "call_function" or not node.users:  # a check, or the unused part of a split
                continue
            for path in dict.fromkeys(flow.module_stack(node)):
                self.by_module.setdefault(path, []).append(node)

    def place(self, ffn: FFN) -> Placement:
        """Decide where an FFN is replaced.

        Raises:
            RefusedError: Its computation is interwoven with something else, in the module named by the message.
        """
        return replace(self._owner(ffn) or self._splice(ffn), axis=ffn.down.axis)

    def place_in_graph(self, ffn: FFN) -> Placement:
        """Decide what the layer is called that replaces an FFN in a graph; dropout around it stays in the graph."""
        try:
            place = self.place(ffn)
        except RefusedError:
            path, _, leaf = ffn.down.weight.rpartition(".")
            place = Placement(
                path if leaf == "weight" else f"{ffn.down.weight}_moe", (), 0.0, _dropout_among(ffn.nodes)
            )
        return replace(place, bypassed=(), handing=(), dropout=0.0, axis=-1)

    def _owner(self, ffn: FFN) -> Placement | None:
        """Return the place of the FFN's own module, when nothing else happens in it."""
        inside = set(ffn.calls[0].inside)
        result = _transparent_outputs(ffn.down.node)
        around = {*_transparent_inputs(ffn.ups[0].source), *result}
        owned = self._work(ffn.name)
        strangers = [node for node in owned if node not in inside and node not in around]
        own_calls = len(owned) - len(strangers)
        if not ffn.name or len(strangers) != own_calls * (len(ffn.calls) - 1):
            return None
        dropout = _dropout_among(node for node in result if node in owned)  # what is outside stays
        return Placement(ffn.name, (), dropout, _dropout_among(ffn.nodes))

    def _splice(self, ffn: FFN) -> Placement:
        """Return the place of the down projection; the modules before it pass their input on, or hand it over."""
        path = self._leaf(ffn.down, ffn)
        bypassed, handing = self._inner_module(ffn) or self._inner_modules(ffn), tuple[str, ...]()
        if not bypassed:
            handing = tuple(dict.fromkeys(self._leaf(up, ffn) for up in ffn.ups))
            bypassed = (*handing, *self._holders(ffn))
            _check_handing(ffn)
        return Placement(path, bypassed, 0.0, _dropout_among(ffn.nodes), handing)

    def _inner_module(self, ffn: FFN) -> tuple[str, ...]:
        """Return the one module that holds up projections and activation, if there is one (BERT's `intermediate`)."""
        inside = {*(n for p in ffn.ups for n in (p.product, p.node)), *ffn.nodes}
        path = flow.innermost_module(inside)
        own = [node for node in self._work(path) if node in inside]
        alone = path and path != ffn.name and len(self._work(path)) == len(ffn.calls) * len(own)
        return (path,) if alone else ()

    def _inner_modules(self, ffn: FFN) -> tuple[str, ...]:
        """Return every module between the input and the down projection (OPT's `fc1` and `activation_fn`), if all is.

        One that is called for something else too, as a dropout may be, is none of them.
        """
        if len(ffn.ups) > 1 or ffn.kind != "mlp":
            return ()
        bypassed = [self._leaf(ffn.ups[0], ffn)]
        for node in ffn.nodes:
            if has(node, TRANSPARENT) and flow.module_stack(node)[-1] == ffn.name:
                continue  # dropout or a cast written in the block itself: there is no module to bypass
            path = flow.module_stack(node)[-1]
            own = [n for n in self._work(path) if n in ffn.nodes]
            if path == ffn.name or len(self._work(path)) != len(ffn.calls) * len(own):
                return ()
            bypassed.append(path)
        return tuple(dict.fromkeys(bypassed))

    def _holders(self, ffn: FFN) -> tuple[str, ...]:
        """Return the modules whose parameters the activation reads: the layer has them from now."""
        paths = {flow.module_stack(node)[-1] for node in ffn.nodes}
        held = {name: name.rpartition(".")[0] for name in region_parameters(ffn.region)}
        for name, path in held.items():
            if path not in paths or path == ffn.name:
                raise RefusedError(f"{ffn.name or 'the model'}: its activation reads {name}, which no module of the "
                                   "activation holds; " + GRAPH_INSTEAD)  # fmt: skip
        return tuple(dict.fromkeys(held.values()))

    def _leaf(self, projection: Projection, ffn: FFN) -> str:
        """Return the module that computes this projection and nothing else."""
        stack, own = flow.module_stack(projection.node), {projection.node, projection.product}
        work = [n for n in self._work(stack[-1] if stack else "") if not has(n, TRANSPARENT)]
        if not stack or len(work) != len(ffn.calls) * len(own):
            where = ffn.name or "the model"
            raise RefusedError(f"{where}: its projection `{projection.node.name}` is not a module; {GRAPH_INSTEAD}")
        return stack[-1]

    def _work(self, path: str) -> list[fx.Node]:
        """Return the nodes that a module issued and that depend on the input."""
        return [node for node in self.by_module.get(path, ()) if not flow.is_static(node, self.static)]


def _check_handing(ffn: FFN) -> None:
    """Refuse to hand over what the down projection would not get: another shape, or the input of another call."""
    where = ffn.name or "the model"
    for call in ffn.calls:
        for up in call.ups:
            if flow.shape(up.source) != flow.shape(call.down.node):
                raise RefusedError(
                    f"{where}: `{call.down.node.name}` has another shape than what `{up.node.name}` reads; "
                    f"{GRAPH_INSTEAD}"
                )
    order = sorted((p.node, number) for number, call in enumerate(ffn.calls) for p in (*call.ups, call.down))
    numbers = [number for _, number in order]
    if numbers != sorted(numbers):
        raise RefusedError(f"{where}: its block calls it again before it is done; {GRAPH_INSTEAD}")


def _transparent_inputs(source: fx.Node) -> list[fx.Node]:
    """Return the casts and reshapes between what the FFN reads and its up projections."""
    nodes = []
    while has(source, TRANSPARENT):
        nodes.append(source)
        source = source.all_input_nodes[0]
    return nodes


def _transparent_outputs(result: fx.Node) -> list[fx.Node]:
    """Return the casts, reshapes and dropout after the down projection."""
    nodes = []
    users = flow.data_users(result)
    while len(users) == 1 and has(users[0], TRANSPARENT):
        nodes.append(users[0])
        users = flow.data_users(users[0])
    return nodes


def _dropout_among(nodes: Iterable[fx.Node]) -> float:
    return max((float(n.args[1]) for n in nodes if op_name(n) == "dropout"), default=0.0)  # type: ignore[arg-type]
