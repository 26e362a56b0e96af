"""Features that reshapes and selections take apart are a slice: read from the strides, however the code wrote it.

`z.view(…, 2, -1)[…, 0, :]`, `z.unflatten(-1, (2, -1)).unbind(-2)[0]` and the first of einops'
`rearrange(z, "… (k i) -> k … i")` are all the first half of the features; `z.view(…, -1, 2)[…, 0]` is every second one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from moeify.passes.matching.operators import TRANSPARENT, Trait, has

_HOPS = 12  # reshapes and selections in a row


@dataclass(frozen=True)
class Cut:
    """Features `start, start + step, …` (up to `stop`, not included) of `source`.

    Attributes:
        source: The activation that is cut.
        nodes: The operators that cut it.
        start: The first feature.
        stop: The end.
        step: From one feature to the next: above 1 where gate and up projection are interleaved.
    """

    source: fx.Node
    nodes: tuple[fx.Node, ...]
    start: int
    stop: int
    step: int


def as_cut(node: fx.Node, axis: int) -> Cut | None:
    """Return the slice of the features that `node` holds, or None when it holds something else.

    Args:
        node: The last operator of a chain of reshapes and selections; the activation is what the chain starts from.
        axis: The dimension of the features, counted from the end, at both ends of the chain.
    """
    chain: list[fx.Node] = []
    source = node
    while len(chain) < _HOPS and has(source, TRANSPARENT | Trait.VIEW):
        chain.append(source)
        source = source.all_input_nodes[0]
    dims = _numbers(source.meta.get("val"))
    if not chain or dims is None or len(dims) < -axis or 0 in dims:
        return None
    whole = torch.empty(dims, device="meta")
    part = _replay(chain, source, whole)
    if part is None or part.dim() < -axis or _positions(part, axis) != _positions(whole, axis):
        return None
    unit, count = whole.stride(axis), part.shape[axis]
    (start, rest), (step, uneven) = divmod(int(part.storage_offset()), unit), divmod(part.stride(axis), unit)
    if rest or uneven or step < 1:
        return None
    return Cut(source, tuple(chain), start, min(start + step * count, dims[axis]), step)


def _replay(chain: list[fx.Node], source: fx.Node, whole: torch.Tensor) -> torch.Tensor | None:
    """Run a chain (last operator first) on a tensor without memory; None when it had to copy."""
    values: dict[fx.Node, object] = {source: whole}

    def value(node: fx.Node) -> object:
        return values[node] if node in values else _number(node.meta["val"])

    for node in reversed(chain):
        if has(node, Trait.COPY):
            values[node] = values[node.all_input_nodes[0]]  # a copy is laid out anew, the same values in the same order
            continue
        try:
            values[node] = node.target(*fx.map_arg(node.args, value), **node.kwargs)  # type: ignore[operator, arg-type]
        except (RuntimeError, KeyError, IndexError, TypeError):
            return None
    part = values[chain[0]]
    if not isinstance(part, torch.Tensor) or part.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        return None
    return part


def _numbers(value: object) -> list[int] | None:
    """Return a tensor's shape in numbers: where sizes are symbols, those of the example."""
    if not isinstance(value, torch.Tensor):
        return None
    dims = [size for dim in value.shape if (size := _number(dim)) is not None]
    return dims if len(dims) == value.dim() else None


def _number(size: object) -> int | None:
    if isinstance(size, torch.SymInt):
        size = size.node.hint
    return size if isinstance(size, int) else None


def _positions(tensor: torch.Tensor, axis: int) -> list[tuple[int, int]]:
    """Return (size, stride) of the dimensions that count positions, those that are one list taken as one."""
    merged: list[tuple[int, int]] = []
    features = tensor.dim() + axis
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if dim == features or size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            size *= merged.pop()[0]
        merged.append((size, stride))
    return merged
