"""The tensors of an output checkpoint, each described as byte ranges of the source or as a small computation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeify.checkpoint.shards import Compute, OutTensor, Part
from moeify.checkpoint.source import Source
from moeify.checkpoint.tensor_info import TensorInfo, torch_dtype
from moeify.errors import CheckpointError
from moeify.families.table import FAMILIES, MOEIFY, SHARED_WIDTH, layer_number
from moeify.layers.build import expert_parts
from moeify.methods.parts import Part as ExpertPart
from moeify.methods.parts import routed_parts
from moeify.plan import Plan, Rows, Site
from moeify.planning.weights import dense_rows, up_bias
from moeify.routers.base import StartValue
from moeify.routing.logits import router_init
from moeify.tracing.skeleton import StoredNames, build_on_meta, may_be_missing, stored_names

if TYPE_CHECKING:
    import torch


def output_tensors(source: Source, plan: Plan, dtype: str | None, unused: Callable[[str], None]) -> Iterator[OutTensor]:
    """Describe every tensor of the output, in the order of the source.

    Raises:
        CheckpointError: the source lacks a tensor that the model needs.
    """
    model = build_on_meta(source.config)
    names = stored_names(model, source.tensors)
    for stored in names.unused:
        unused(stored)
    _check_complete(model, names, plan)
    maker = _Maker(source, names.of, plan, dtype)
    site_of = {parameter: site for site in plan.sites for parameter in site.parameters}
    site_of |= {dense: site for site in plan.sites for dense, _ in site.learned}
    replaced = tuple(f"{path}." for site in plan.sites for path in (site.path, *site.through))
    done: set[str] = set()
    for name in names.of:
        site = site_of.get(name)
        if site is None and name.startswith(replaced):
            continue  # what the dense module held besides and never read goes with it, as it does in place
        if site is None:
            yield maker.copied(names.of[name], name)
        elif site.path not in done:
            done.add(site.path)
            yield from maker.native(site) if plan.target != MOEIFY else maker.stacked(site)
    for stored in names.merged:
        yield maker.copied(stored, stored)  # transformers will do with it what it did before


def _check_complete(model: Any, names: StoredNames, plan: Plan) -> None:
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
class _Maker:
    """Turns sites into output tensors."""

    source: Source
    on_disk: dict[str, str]
    plan: Plan
    dtype: str | None

    def copied(self, stored: str, name: str) -> OutTensor:
        """A tensor that stays what it is, under the model's name for it."""
        info = self.source.tensors[stored]
        target = self.stored_dtype(info)
        if target == info.dtype:
            return OutTensor.copy(info, name)
        return OutTensor(name, target, info.shape, (lambda: self.source.read(stored).to(torch_dtype(target)),))

    def stored_dtype(self, info: TensorInfo) -> str:
        """The dtype in which a tensor is written: only floating-point ones are cast."""
        return self.dtype if self.dtype and torch_dtype(info.dtype).is_floating_point else info.dtype

    def read(self, name: str) -> torch.Tensor:
        """A dense parameter by the model's name for it, in the dtype to be written."""
        tensor = self.source.read(self.on_disk[name])
        return tensor.to(torch_dtype(self.stored_dtype(self.source.tensors[self.on_disk[name]])))

    def site_dtype(self, site: Site) -> str:
        """The dtype of a site's experts and router."""
        return self.stored_dtype(self.source.tensors[self.on_disk[site.down.parameter]])

    def stacked(self, site: Site) -> Iterator[OutTensor]:
        """A site in moeify format: the state dict of the layer."""
        for name, start in self.plan.config.router.start(self.plan.config, site.hidden, site.path).items():
            yield self.started(start, site, f"{site.path}.router.{name}")
        for stack, parts in expert_parts(site, self.plan.config).items():
            experts = self.experts(site, parts)
            for name, first in experts[0].items():
                pieces = tuple(piece for expert in experts for piece in expert[name].parts)
                shape = (len(parts), *first.shape)
                yield OutTensor(f"{site.path}.{stack}.{name}", first.dtype, shape, pieces)
        for dense, own in site.learned:
            if dense in self.on_disk:  # a buffer that is not saved is none of the checkpoint's
                yield self.copied(self.on_disk[dense], f"{site.path}.experts.region.{own}")

    def started(self, start: StartValue, site: Site, name: str) -> OutTensor:
        """A tensor of a router, from the seed and the name that the layer has in place."""
        kind = start.dtype or self.site_dtype(site)
        return OutTensor(name, kind, start.shape, (lambda: start.build().to(torch_dtype(kind)),))

    def experts(self, site: Site, parts: list[ExpertPart]) -> list[dict[str, OutTensor]]:
        """Each expert's tensors by the stack's names for them; equal experts share their pieces, computed once."""
        made: dict[object, dict[str, OutTensor]] = {}
        experts = []
        for part in parts:
            key = (part.shard, part.down_scale) if part.method.exact else part.name
            if key not in made:
                made[key] = self.expert(site, part)
            experts.append(made[key])
        return experts

    def expert(self, site: Site, part: ExpertPart) -> dict[str, OutTensor]:
        """One expert's tensors by the stack's names for them."""
        dtype, inner = self.site_dtype(site), site.intermediate // self.plan.config.granularity
        ups = [self.up(site, part, i) for i in range(len(site.ups))]
        rows = sum(up.shape[0] for up in ups)
        pieces = tuple(piece for up in ups for piece in up.parts)
        found = [
            OutTensor(site.up_name, dtype, (rows, site.hidden), pieces),
            OutTensor("down_proj", dtype, (site.hidden, inner), self.down(site, part)),
        ]
        if site.up_bias:
            build = functools.partial(self.up_bias, site, part)
            found.append(OutTensor(f"{site.up_name}_bias", dtype, (rows,), (build,)))
        if site.down.bias:
            build = functools.partial(self.down_bias, site, part)
            found.append(OutTensor("down_proj_bias", dtype, (site.hidden,), (build,)))
        return {tensor.name: tensor for tensor in found}

    def up(self, site: Site, part: ExpertPart, index: int) -> OutTensor:
        """An expert's rows of one projection into the intermediate width."""
        whole = site.ups[index]
        rows = whole.shard(part.shard, self.plan.config.granularity)
        verbatim = self.verbatim(site, rows) if part.method.exact else None

        def build() -> torch.Tensor:
            return part.up(dense_rows(whole, self.read, site.transposed), index)

        return OutTensor("", self.site_dtype(site), (rows.count, site.hidden), verbatim or (build,))

    def up_bias(self, site: Site, part: ExpertPart) -> torch.Tensor:
        """An expert's bias of all of them."""
        return part.ups(up_bias(site, self.read), [rows.count for rows in site.ups])

    def down_bias(self, site: Site, part: ExpertPart) -> torch.Tensor:
        """The bias of an expert's projection back."""
        assert site.down.bias is not None
        return part.down_bias(self.read(site.down.bias))

    def down(self, site: Site, part: ExpertPart) -> tuple[Part | Compute, ...]:
        """An expert's projection back (H, F)."""
        whole = part.method.exact and part.down_scale == 1 and self.plan.config.granularity == 1
        verbatim = self.verbatim(site, site.down) if whole else None
        return verbatim or (lambda: part.down(dense_rows(site.down, self.read, site.transposed)),)

    def native(self, site: Site) -> Iterator[OutTensor]:
        """A site in the key layout of a native family."""
        family, dtype, layer = FAMILIES[self.plan.target], self.site_dtype(site), layer_number(site.path)
        router = self.plan.config.router.start(self.plan.config, site.hidden, site.path)["weight"]
        yield self.started(router, site, family.router.format(layer=layer))
        for number, expert in enumerate(self.experts(site, routed_parts(self.plan.config, site.path))):
            both, down = expert["gate_up_proj"], expert["down_proj"]
            half = (both.shape[0] // 2, site.hidden)
            for key, piece in zip((family.gate, family.up), both.parts, strict=True):
                yield OutTensor(key.format(layer=layer, expert=number), dtype, half, (piece,))
            yield OutTensor(family.down.format(layer=layer, expert=number), dtype, down.shape, down.parts)
        if family.shared:
            yield from self.shared(site, family.shared.format(layer=layer), dtype)

    def shared(self, site: Site, prefix: str, dtype: str) -> Iterator[OutTensor]:
        """A shared expert that adds zero: its projection back is zero, the rest is ready to be trained."""

        def drawn(name: str, *shape: int) -> OutTensor:
            def build() -> torch.Tensor:
                init = router_init((shape[0], shape[1]), self.plan.config.seed, f"{site.path}.shared_expert.{name}")
                return init.to(torch_dtype(dtype))

            return OutTensor(f"{prefix}.{name}", dtype, shape, (build,))

        def zeros(name: str, *shape: int) -> OutTensor:
            def build() -> torch.Tensor:
                import torch

                return torch.zeros(shape, dtype=torch_dtype(dtype))

            return OutTensor(name, dtype, shape, (build,))

        yield drawn("gate_proj.weight", SHARED_WIDTH, site.hidden)
        yield drawn("up_proj.weight", SHARED_WIDTH, site.hidden)
        yield zeros(f"{prefix}.down_proj.weight", site.hidden, SHARED_WIDTH)
        yield zeros(f"{prefix}_gate.weight", 1, site.hidden)

    def verbatim(self, site: Site, rows: Rows) -> tuple[Part] | None:
        """The source's own bytes, where these rows lie in them one after the other; None when they must be computed."""
        info = self.source.tensors[self.on_disk[rows.parameter]]
        if site.transposed or rows.step != 1 or self.stored_dtype(info) != info.dtype:
            return None
        return (Part(info.name, None if rows.all else (rows.start, rows.stop)),)
