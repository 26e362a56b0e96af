"""What models write in a way that torch.export, torch.onnx or a runtime cannot take, in another way.

Shape legend: T tokens, E experts, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from transformers import masking_utils

from moeify.contract.stock_experts import stock_experts

HALF = frozenset({torch.float16, torch.bfloat16})
_ATEN = torch.ops.aten

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@contextmanager
def broadcast_padding() -> Iterator[None]:
    """Let transformers broadcast a padding mask inside the block: CUDA graphs cannot replay a gather by index."""
    indexed = masking_utils.padding_mask_function

    def padding_mask_function(padding_mask: Tensor) -> MaskFunction:
        by_index: MaskFunction = indexed(padding_mask)

        def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            whole = batch.dim() == 4 and padding_mask.shape[-1] == key.shape[-1]
            return padding_mask[:, None, None, :] if whole else by_index(batch, head, query, key)

        return mask

    masking_utils.padding_mask_function = padding_mask_function
    try:
        yield
    finally:
        masking_utils.padding_mask_function = indexed


class ExactNumbers(TorchFunctionMode):
    """Inside the block `torch.tensor(number, dtype=half)` is the number in float32, then a cast.

    So the graph holds the number itself, and a float32 version of the graph is not rounded.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is torch.tensor and isinstance(args[0], float) and kwargs.get("dtype") in HALF:
            return func(args[0], dtype=torch.float32).to(kwargs["dtype"])
        return func(*args, **kwargs)


def unsqueeze_real_parts(graph_module: fx.GraphModule) -> None:
    """Let every new axis of a complex tensor be one of its real and imaginary parts; in place.

    Rotary embeddings are written with complex numbers, and torch.onnx cannot translate this operator for them.

    Before:  z = unsqueeze(c, dim)                                     (c complex)
    After:   z = view_as_complex(unsqueeze(view_as_real(c), dim))
    """
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=_ATEN.unsqueeze.default):
        value: Tensor = node.meta["val"]
        if not value.is_complex():
            continue
        with graph.inserting_before(node):
            parts = _call(graph, _ATEN.view_as_real.default, node.args[0])
            wider = _call(graph, _ATEN.unsqueeze.default, parts, node.args[1] % value.dim())
            node.replace_all_uses_with(_call(graph, _ATEN.view_as_complex.default, wider))
        graph.erase_node(node)


def _call(graph: fx.Graph, target: Callable[..., object], *args: fx.node.Argument) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in args))
    return node


def traceable(model: nn.Module) -> nn.Module:
    """Return a model that computes the same and that torch.export can trace; the model itself, where nothing hinders.

    The experts of Switch Transformers are modules of their own, called by a loop over data.

    Args:
        model: Any; it stays as it is.
    """
    if getattr(getattr(model, "config", None), "model_type", None) != "switch_transformers":
        return model
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        experts, router = getattr(module, "experts", None), getattr(module, "router", None)
        if isinstance(experts, nn.ModuleDict) and isinstance(router, nn.Module):
            module.experts = _StackedExperts(experts)
            _settle(router)
    return model


class _StackedExperts(nn.Module):
    """The experts of one layer with their weights in one tensor, described as transformers describes its own."""

    has_gate = has_bias = is_transposed = has_post_expert_norm = False

    def __init__(self, experts: nn.ModuleDict) -> None:
        super().__init__()

        def stacked(projection: str) -> nn.Parameter:
            weights = [expert.get_parameter(f"{projection}.weight").detach() for expert in experts.values()]
            return nn.Parameter(torch.stack(weights))

        self.up_proj, self.down_proj = stacked("wi"), stacked("wo")
        self.act_fn = next(iter(experts.values())).act

    def forward(self, x_TH: Tensor, chosen_T1E: Tensor, weights_T1: Tensor) -> Tensor:
        """Compute the expert that each token chose; a token that came too late has none."""
        experts = chosen_T1E.shape[-1]
        ids_T1 = torch.where(chosen_T1E.amax(-1) > 0, chosen_T1E.argmax(-1), experts)
        return stock_experts(self, x_TH, ids_T1, weights_T1)


class _SettledLinear(nn.Linear):
    """A projection in its final dtype: the router casts it in every forward, which torch.export cannot carry."""

    def to(self, *_: object, **__: object) -> _SettledLinear:
        return self


def _settle(router: nn.Module) -> None:
    classifier, dtype = router.get_submodule("classifier"), vars(router)["dtype"]
    classifier.to(dtype).__class__ = _SettledLinear
