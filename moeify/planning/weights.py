"""Read the dense weights of a site out of a state dict or a checkpoint, in one orientation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moeify.methods.parts import DenseFFN
from moeify.plan import Rows, Site

Read = Callable[[str], Tensor]


def dense_ffn(site: Site, read: Read) -> DenseFFN:
    """Collect an FFN's weights.

    Args:
        site: Where they are and how they are stored.
        read: Returns a parameter by name.
    """
    return DenseFFN(
        up_JH=up_rows(site, read),
        down_HI=dense_rows(site.down, read, site.transposed),
        up_bias_J=up_bias(site, read) if site.up_bias else None,
        down_bias_H=None if site.down.bias is None else read(site.down.bias),
    )


def up_rows(site: Site, read: Read) -> Tensor:
    """Return the first projections as (J, H): gate rows, then up rows."""
    return torch.cat([dense_rows(rows, read, site.transposed) for rows in site.ups])


def up_bias(site: Site, read: Read) -> Tensor:
    """Return the first projections' bias (J,); a projection that has none gets zeros."""
    halves = [None if r.bias is None else read(r.bias)[r.start : r.stop : r.step] for r in site.ups]
    like = next(half for half in halves if half is not None)
    filled = zip(halves, site.ups, strict=True)
    return torch.cat([like.new_zeros(rows.count) if half is None else half for half, rows in filled])


def dense_rows(rows: Rows, read: Read, transposed: bool) -> Tensor:
    """Return some output rows of a projection as (out, in), whichever way the parameter is stored."""
    weight = read(rows.parameter)
    return (weight.t() if transposed else weight)[rows.start : rows.stop : rows.step]


def held(root: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer by its name."""
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(root.get_submodule(path), leaf)
    return tensor
