"""The tensors of an output checkpoint, each described as byte ranges of the source or as a small computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from moeify.checkpoint.shards import Compute, OutTensor, SourceRows
from moeify.checkpoint.tensor_info import TensorInfo, torch_dtype, widest
from moeify.conversion.dense import DenseCheckpoint
from moeify.conversion.layout import Block, LayerTensor, extra_tensors, stored_tensors
from moeify.errors import CheckpointError
from moeify.families.base import Held
from moeify.families.table import rewrites
from moeify.plan import Plan, Site
from moeify.tracing.skeleton import may_be_missing

Piece: TypeAlias = "SourceRows | Compute"


def output_tensors(
    dense: DenseCheckpoint,
    plan: Plan,
    dtype: str | None,
    unused: Callable[[Sequence[str]], None],
    held: Mapping[str, Held] | None = None,
) -> Iterator[OutTensor]:
    """Describe every tensor of the output, in the order of the source.

    Args:
        dense: The dense checkpoint.
        plan: What is converted.
        dtype: The safetensors name of the dtype for floating-point tensors; None keeps the source's.
        unused: Called with the names of the tensors that the model has no place for, if there are any.
        held: What the layers of a native target hold, if not what `stored_tensors` takes for granted.

    Raises:
        CheckpointError: The source lacks a tensor that the model needs.
    """
    names = dense.names
    if left_out := (*names.unused, *dense.source.unused):
        unused(left_out)
    _check_complete(dense, plan)
    outputs = _Outputs(dense, dtype)
    site_of = {name: site for site in plan.sites for name in site.reads}
    replaced = tuple(f"{path}." for site in plan.sites for path in (site.path, *site.bypassed))
    done: set[str] = set()
    for name in names.of:
        site = site_of.get(name)
        if site is None and not name.startswith(replaced):  # other values in a replaced module are left out
            yield from outputs.rewritten(names.of[name], name, plan)
        elif site is not None and site.path not in done:
            done.add(site.path)
            yield from (outputs.of(tensor, site) for tensor in stored_tensors(plan, site, held))
    yield from (outputs.of(tensor, plan.sites[0]) for tensor in extra_tensors(plan, dense.config, names.of))
    for stored in names.merged:
        yield outputs.copied(stored, stored)  # transformers will do with it what it did before


def _check_complete(dense: DenseCheckpoint, plan: Plan) -> None:
    model, names = dense.model, dense.names
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    converted = {parameter for site in plan.sites for parameter in site.parameters}
    for tied in aliases.values():
        present = any(name in names.of or may_be_missing(model, name) for name in tied)
        if present or (names.merged and not converted.intersection(tied)):
            continue  # what transformers merges while loading is checked when the result is loaded
        if names.merged:
            raise CheckpointError(f"{tied[0]} is stored in another form than the model holds it in: convert in place")
        raise CheckpointError(f"the checkpoint lacks the tensor {tied[0]}: it is not a whole {type(model).__name__}")


@dataclass(frozen=True)
class _Outputs:
    """Describes output tensors; equal blocks share a piece, which is computed once."""

    dense: DenseCheckpoint
    dtype: str | None
    pieces: dict[Block, Piece] = field(default_factory=dict)
    whole: dict[tuple[Block, ...], Compute] = field(default_factory=dict)

    def copied(self, stored: str, name: str) -> OutTensor:
        """Describe a tensor that stays what it is, under the model's name for it."""
        info = self.dense.source.tensors[stored]
        target = self.stored_dtype(info)
        if target == info.dtype:
            return OutTensor.copy(info, name)
        return OutTensor(name, target, info.shape, (lambda: self.cast(info),))

    def rewritten(self, stored: str, name: str, plan: Plan) -> Iterator[OutTensor]:
        """Describe what a native format stores of a tensor that stays what it is, or takes another form there."""
        rewrite = rewrites(plan, name)
        if rewrite is None:
            yield self.copied(stored, name)
            return
        info, config = self.dense.source.tensors[stored], self.dense.config
        dtype = "F32" if rewrite.wide else self.stored_dtype(info)
        for part, compute in rewrite.parts.items():
            shape = tuple(compute(torch.empty(info.shape, device="meta"), config).shape)
            yield OutTensor(part, dtype, shape, (partial(self.computed, info, compute, dtype),))

    def computed(self, info: TensorInfo, compute: Callable[..., torch.Tensor], dtype: str) -> torch.Tensor:
        """Compute what is stored of a tensor in another form."""
        return compute(self.cast(info).to(torch_dtype(dtype)), self.dense.config).contiguous()

    def of(self, tensor: LayerTensor, site: Site) -> OutTensor:
        """Describe a tensor of a new layer, in the widest dtype of what it replaces.

        Raises:
            CheckpointError: The checkpoint does not hold a buffer that the activation reads.
        """
        if tensor.copied is not None:
            if tensor.copied not in self.dense.names.of:
                raise CheckpointError(
                    f"the activation of {site.path} reads {tensor.copied}, which the checkpoint does not hold: load "
                    "the model, convert it in place and save it"
                )
            return self.copied(self.dense.names.of[tensor.copied], tensor.name)
        dtype = widest([self.stored_dtype(self.dense.info(name)) for name in tensor.sources or [site.down.parameter]])
        if tensor.start is not None:
            build, dtype = tensor.start.build, tensor.start.stored(dtype)
            return OutTensor(tensor.name, dtype, tensor.shape, (lambda: build().to(torch_dtype(dtype)),))
        if tensor.turned is not None:
            return OutTensor(tensor.name, dtype, tensor.shape, tuple(self.turned(tensor, dtype)))
        if tensor.axis:
            return OutTensor(tensor.name, dtype, tensor.shape, (lambda: self.side_by_side(tensor, dtype),))
        return OutTensor(tensor.name, dtype, tensor.shape, tuple(self.piece(block, dtype) for block in tensor.blocks))

    def side_by_side(self, tensor: LayerTensor, dtype: str) -> torch.Tensor:
        """Compute a tensor whose blocks do not follow each other in memory."""
        filled = torch.empty(tensor.shape, dtype=torch_dtype(dtype))
        tensor.fill(filled, self.read)
        return filled

    def turned(self, tensor: LayerTensor, dtype: str) -> Iterator[Compute]:
        """Yield the computation of each expert's part of a stacked tensor that is stored in a form of its own."""
        assert tensor.turned is not None
        count = len(tensor.blocks) // tensor.shape[0]
        for start in range(0, len(tensor.blocks), count):
            blocks = tensor.blocks[start : start + count]
            yield self.whole.setdefault(blocks, partial(self.one_turned, blocks, tensor.turned, dtype))

    def one_turned(self, blocks: tuple[Block, ...], turn: Callable[[Tensor], Tensor], dtype: str) -> Tensor:
        """Compute one expert's part of it."""
        rows = torch.cat([block.value(self.read) for block in blocks])
        return turn(rows.to(torch_dtype(dtype))).contiguous()

    def piece(self, block: Block, dtype: str) -> Piece:
        """Return the source's own bytes where a block is nothing else, or the computation of its values."""
        if block not in self.pieces:
            verbatim = self.verbatim(block, dtype)
            self.pieces[block] = verbatim or (lambda: block.value(self.read).to(torch_dtype(dtype)))
        return self.pieces[block]

    def verbatim(self, block: Block, dtype: str) -> SourceRows | None:
        """Return the rows of the source tensor that hold a block's bytes one after the other."""
        if block.source is None:
            return None
        info, rows = self.dense.info(block.source), block.rows
        all_columns = block.columns is None or (not rows.transposed and block.columns == (0, info.shape[1]))
        unchanged = block.change is None and block.scale == 1
        if not (all_columns and unchanged and rows.step == 1 and info.dtype == dtype):
            return None
        return SourceRows(info.name, None if rows.count == rows.out_features else (rows.start, rows.stop))

    def read(self, name: str) -> torch.Tensor:
        """Read a dense tensor by the model's name for it, in the dtype to be written."""
        return self.cast(self.dense.info(name))

    def cast(self, info: TensorInfo) -> torch.Tensor:
        """Read a tensor of the source in the dtype to be written."""
        return self.dense.source.read(info.name).to(torch_dtype(self.stored_dtype(info)))

    def stored_dtype(self, info: TensorInfo) -> str:
        """Return the dtype in which a tensor is written: only floating-point ones are cast."""
        return self.dtype if self.dtype and torch_dtype(info.dtype).is_floating_point else info.dtype
