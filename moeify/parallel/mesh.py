"""The ranks that share experts, and those that hold copies of them, from a device mesh."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moeify.errors import ConfigError

EP = "ep"
_SAME_TOKENS = {"tp", "pp", "cp", "sp", "etp"}  # ranks of these do not see tokens of their own
_MAKE = f'init_device_mesh("cuda", (ranks // n, n), mesh_dim_names=("efsdp", "{EP}"))'


@dataclass(frozen=True)
class Ranks:
    """Where a rank stands.

    Attributes:
        mesh: The dimension that shards experts.
        group: Its ranks, which hold different experts.
        copies: The ranks that hold the same experts; None where there is no other.
    """

    mesh: DeviceMesh
    group: dist.ProcessGroup
    copies: dist.ProcessGroup | None

    @property
    def size(self) -> int:
        """How many ranks share the experts."""
        return dist.get_world_size(self.group)

    @property
    def place(self) -> int:
        """The place of this rank among them."""
        return dist.get_rank(self.group)


def ranks_of(mesh: object) -> Ranks:
    """Read a mesh; all ranks must call it.

    Args:
        mesh: The "ep" dimension of a mesh over all ranks, or that mesh; its other dimensions are data-parallel.

    Raises:
        ConfigError: It is none, leaves ranks out, or has dimensions along which ranks share tokens.
    """
    names = tuple(getattr(mesh, "mesh_dim_names", None) or ())
    if not isinstance(mesh, DeviceMesh) or EP not in names:
        found = f"a mesh of the dimensions {names}" if isinstance(mesh, DeviceMesh) else f"a {type(mesh).__name__}"
        raise ConfigError(f"{found} has no dimension {EP!r}: make one with {_MAKE} and pass mesh[{EP!r}]")
    mesh = mesh if mesh.ndim == 1 else mesh[EP]
    root = mesh._get_root_mesh()
    world = dist.get_world_size()
    if root.get_coordinate() is None or root.size() != world:
        raise ConfigError(
            f"the mesh {tuple(root.mesh.shape)} has {root.size()} of the {world} ranks: choose a size of {EP!r} that "
            f"divides {world}, as in {_MAKE}"
        )
    dims = tuple(root.mesh_dim_names or ())
    if shared := sorted(_SAME_TOKENS.intersection(dims)):
        raise ConfigError(
            f"the mesh has a dimension {shared[0]!r}, along which ranks share tokens: expert parallelism works beside "
            "data-parallel dimensions only"
        )
    copies_nM = torch.movedim(root.mesh, dims.index(EP), 0).flatten(1) if root.ndim > 1 else root.mesh[:, None]
    return Ranks(mesh, mesh.get_group(), _group_of(copies_nM.tolist()))


def _group_of(each: list[list[int]]) -> dist.ProcessGroup | None:
    """Make a group of each list of ranks, and return this rank's; None if they have one rank each."""
    if len(each[0]) == 1:
        return None
    groups: dict[bool, dist.ProcessGroup] = {dist.get_rank() in ranks: dist.new_group(ranks) for ranks in each}
    return groups[True]
