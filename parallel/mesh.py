"""The axes that the processes form: dp (samples), ring and head (one sequence), tp (one layer's weights)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from math import prod
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Degree = int | Literal["auto"]
# Beyond so many ranks the all-to-all has more messages than it is worth beside a ring.
MOST_HEAD = 8


class Heads(NamedTuple):
    """How many heads a model has: of queries, and of keys and values."""

    q: int
    kv: int


@dataclass(frozen=True)
class Mesh:
    """Degrees of the axes; `auto` takes what is left of the world.

    With several `auto`, `head` beside `ring` takes the largest degree of at most 8 with which head x tp
    divides a node, so that no group of theirs leaves one, and which divides the kv heads, or, if none but 1
    does, the query heads; `ring` takes the rest. `head` without it takes what is left; where dp could take
    some, no more than gives each rank a query head. dp takes whatever the other axes leave.
    """

    dp: Degree = "auto"
    ring: Degree = 1
    head: Degree = 1
    tp: Degree = 1

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value != "auto" and (not isinstance(value, int) or value < 1):
                raise ValueError(
                    f"parallel.mesh.{f.name} is {value!r}; it must be auto or a whole number from 1"
                )

    def degrees(self, world: int, node: int | None = None, heads: Heads | None = None) -> dict[str, int]:
        """The degree of each axis for `world` processes, `node` of them on a machine (None: all), and a model
        of these heads (None: of any). ValueError if they do not fit.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        fixed = prod(d for d in given.values() if d != "auto")
        if world % fixed or (world != fixed and "auto" not in given.values()):
            words = " x ".join(f"{name}={d}" for name, d in given.items())
            fits = f"start a multiple of {fixed}" if "auto" in given.values() else f"start {fixed}"
            raise ValueError(
                f"parallel.mesh is {words} = {fixed} processes, but {world} were started: "
                f"{fits} (torchrun --nproc-per-node), or set one of the degrees to auto"
            )
        if heads is not None and given["tp"] != "auto":
            # what the ranks of tp leave each other
            heads = Heads(heads.q // given["tp"], heads.kv // given["tp"])
        rest = world // fixed
        fits_in = [d for d in range(1, rest + 1) if rest % d == 0]
        if given["head"] == "auto" and given["ring"] == "auto":
            tp = 1 if given["tp"] == "auto" else given["tp"]
            inside = [d for d in fits_in if d <= MOST_HEAD and (node or world) % (d * tp) == 0]
            given["head"] = _suited(inside, heads)
            rest //= given["head"]
        elif given["head"] == "auto" and given["dp"] == "auto" and heads is not None:
            given["head"] = max(d for d in fits_in if d <= max(1, heads.q))
            rest //= given["head"]
        for name in ("ring", "head", "tp", "dp"):
            if given[name] == "auto":
                given[name], rest = rest, 1
        return given

    def build(self, device: str, *, node: int | None = None, heads: Heads | None = None) -> DeviceMesh:
        """The DeviceMesh over the initialised process group, whose groups all wait as long as that one; every
        group has run one collective when this returns. node, heads: see `degrees`.
        """
        world = dist.get_world_size()
        degrees = self.degrees(world, node, heads)
        mesh = spanned(device, torch.arange(world).view(*degrees.values()), tuple(degrees))
        # point-to-point edges may leave ranks out, which must not be the first thing a group ever does
        for name in degrees:
            dist.all_reduce(torch.zeros(1, device=device), group=mesh.get_group(name))
        return mesh


def _suited(degrees: Sequence[int], heads: Heads | None) -> int:
    """The largest of the degrees that deals out the heads evenly: the kv heads, else the query heads."""
    if heads is not None:
        for count in heads.kv, heads.q:
            even = [d for d in degrees if d > 1 and count % d == 0]
            if even:
                return max(even)
    return max(degrees, default=1) if heads is None else 1


def patience(group: dist.ProcessGroup | None = None) -> timedelta | None:
    """How long `group` (None: all processes) waits; None for a backend that never does, such as fake.

    Torch gives a new group a time of its own, up to half an hour, unless it is told.
    """
    group = group or dist.group.WORLD
    assert group is not None
    options = group._get_backend(group._device_types[0]).options
    return options._timeout if options else None


def spanned(device: str, ranks: Tensor, names: tuple[str, ...]) -> DeviceMesh:
    """The DeviceMesh of these ranks, int [degree of each axis], with groups that wait as long as all
    processes together do. Every process calls it.
    """
    groups = []
    for dim in range(ranks.ndim):
        lines = ranks.movedim(dim, -1).flatten(0, -2).tolist()
        found = dist.group.WORLD
        assert found is not None
        if len(lines[0]) < dist.get_world_size():
            made = [dist.new_group(x, timeout=patience(), group_desc=f"mesh {names[dim]}") for x in lines]
            found = next(g for g, x in zip(made, lines, strict=True) if dist.get_rank() in x)
        groups.append(found)
    return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=names)


def joined(mesh: DeviceMesh, axes: tuple[str, ...]) -> dist.ProcessGroup:
    """The ranks along several axes together, neighbours along the last one next to each other; one group a
    mesh, which waits as long as all processes together do. Every rank of the mesh calls it.
    """
    parts = [group for group in (axis_group(mesh, axis) for axis in axes) if dist.get_world_size(group) > 1]
    if len(parts) < 2:
        return parts[0] if parts else axis_group(mesh, axes[-1])
    told = " x ".join(group.group_name for group in parts)
    for group in dist.distributed_c10d._world.pg_map:
        if group.group_desc == told:
            return group
    dims, last = [(mesh.mesh_dim_names or ()).index(axis) for axis in axes], list(range(-len(axes), 0))
    lines = mesh.mesh.movedim(dims, last).flatten(-len(axes))
    ranks = next(x for x in lines.reshape(-1, lines.shape[-1]).tolist() if dist.get_rank() in x)
    found = dist.group.WORLD
    if len(ranks) < dist.get_world_size():
        found = dist.new_group(ranks, timeout=patience(), use_local_synchronization=True, group_desc=told)
    assert isinstance(found, dist.ProcessGroup)
    return found


def axis_group(mesh: DeviceMesh, axis: str) -> dist.ProcessGroup:
    """The ranks along an axis of the mesh that this one is among. ValueError if it has no such axis."""
    names = mesh.mesh_dim_names or ()
    if axis not in names:
        raise ValueError(f"parallel.layout.axis is {axis!r}; it can be {', '.join(names)}")
    return mesh.get_group(axis)
