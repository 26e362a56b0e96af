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
from moeify.layers.start import StartValue, router_start
from moeify.plan import Plan, Rows, Site, names_under
from moeify.planning.weights import dense_rows, up_bias, up_rows
from moeify.routing.routers import router_init
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
    done: set[str] = set()
    for name in names.of:
        site = site_of.get(name)
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

    def router(self, site: Site, name: str) -> OutTensor:
        """The router, from the seed and the name that the layer has in place."""
        shape = (self.plan.config.experts, site.hidden)
        dtype = self.site_dtype(site)

        def build() -> torch.Tensor:
            init = router_init(shape, self.plan.config.seed, f"{site.path}.router.weight")
            return init.to(torch_dtype(dtype))

        return OutTensor(name, dtype, shape, (build,))

    def stacked(self, site: Site) -> Iterator[OutTensor]:
        """A site in moeify format: the state dict of the layer."""
        experts, dtype = self.plan.config.experts, self.site_dtype(site)
        rows = sum(r.count for r in site.ups)
        up, down, *biases = names_under(site)
        for name, start in router_start(self.plan.config, site.hidden, site.path).items():
            kind = start.dtype or dtype
            build = functools.partial(_start_value, start, kind)
            yield OutTensor(f"{site.path}.router.{name}", kind, start.shape, (build,))
        ups = self.verbatim(site, site.ups) or (functools.partial(up_rows, site, self.read),)
        yield OutTensor(up, dtype, (experts, rows, site.hidden), ups * experts)
        yield OutTensor(
            down, dtype, (experts, site.hidden, site.intermediate), self.projection(site, site.down) * experts
        )
        if site.up_bias:
            build = functools.partial(up_bias, site, self.read)
            yield OutTensor(biases.pop(0), dtype, (experts, rows), (build,) * experts)
        if site.down.bias:
            build = functools.partial(self.read, site.down.bias)
            yield OutTensor(biases.pop(0), dtype, (experts, site.hidden), (build,) * experts)
        for dense, own in site.learned:
            if dense in self.on_disk:  # a buffer that is not saved is none of the checkpoint's
                yield self.copied(self.on_disk[dense], f"{site.path}.experts.region.{own}")

    def native(self, site: Site) -> Iterator[OutTensor]:
        """A site in the key layout of a native family."""
        family, dtype, layer = FAMILIES[self.plan.target], self.site_dtype(site), layer_number(site.path)
        gate, up = site.ups
        yield self.router(site, family.router.format(layer=layer))
        # Each piece is described once, so that what must be computed is computed once for all experts.
        inner = [
            (family.gate, (gate.count, site.hidden), self.projection(site, gate)),
            (family.up, (up.count, site.hidden), self.projection(site, up)),
            (family.down, (site.hidden, site.intermediate), self.projection(site, site.down)),
        ]
        for expert in range(self.plan.config.experts):
            for key, shape, parts in inner:
                yield OutTensor(key.format(layer=layer, expert=expert), dtype, shape, parts)
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

    def projection(self, site: Site, rows: Rows) -> tuple[Part | Compute, ...]:
        """Some rows of one projection as (out, in)."""
        return self.verbatim(site, (rows,)) or (functools.partial(dense_rows, rows, self.read, site.transposed),)

    def verbatim(self, site: Site, rows: tuple[Rows, ...]) -> tuple[Part, ...] | None:
        """The source's own bytes, where these rows lie in them one after the other; None when they must be computed."""
        infos = [self.source.tensors[self.on_disk[r.parameter]] for r in rows]
        if site.transposed or any(r.step != 1 for r in rows) or any(self.stored_dtype(i) != i.dtype for i in infos):
            return None
        return tuple(Part(i.name, None if r.all else (r.start, r.stop)) for i, r in zip(infos, rows, strict=True))


def _start_value(start: StartValue, dtype: str) -> torch.Tensor:
    return start.build().to(torch_dtype(dtype))
