"""The axes that the processes form: dp (samples), ring and head (one sequence), tp (one layer's weights)."""

from dataclasses import dataclass, fields
from math import prod
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

Degree = int | Literal["auto"]


@dataclass(frozen=True)
class Mesh:
    """Degrees of the axes; `auto` takes what is left of the world.

    With several `auto`, `head` beside `ring` takes the largest divisor that fits a node and is at most 8,
    `ring` the rest, and dp whatever the other axes leave. The innermost axes, tp and head, stay inside a node
    when their product divides it.
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

    def degrees(self, world: int, node: int | None = None) -> dict[str, int]:
        """The degree of each axis for `world` processes, `node` of them on a machine. ValueError if they do
        not fit.
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
        rest = world // fixed
        if given["head"] == "auto" and given["ring"] == "auto":
            most = min(8, node or world)
            given["head"] = max(d for d in range(1, most + 1) if rest % d == 0)
            rest //= given["head"]
        for name in ("ring", "head", "tp", "dp"):
            if given[name] == "auto":
                given[name], rest = rest, 1
        return given

    def build(self, device: str, *, node: int | None = None) -> DeviceMesh:
        """The DeviceMesh over the initialised process group; every group has run one collective when this
        returns.
        """
        degrees = self.degrees(dist.get_world_size(), node)
        mesh = init_device_mesh(device, tuple(degrees.values()), mesh_dim_names=tuple(degrees))
        # point-to-point edges may leave ranks out, which must not be the first thing a group ever does
        for name in degrees:
            dist.all_reduce(torch.zeros(1, device=device), group=mesh.get_group(name))
        return mesh


def axis_group(mesh: DeviceMesh, axis: str) -> dist.ProcessGroup:
    """The ranks along an axis of the mesh that this one is among. ValueError if it has no such axis."""
    names = mesh.mesh_dim_names or ()
    if axis not in names:
        raise ValueError(f"parallel.layout.axis is {axis!r}; it can be {', '.join(names)}")
    return mesh.get_group(axis)
