"""Which axis of a factorised model is sharded, switched between its blocks (DSP, Zhao et al. 2024)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .comm import Traffic, trade
from .mesh import axis_group


class Axes:
    """Dynamic Sequence Parallelism: a video [B, T, S, C] of T frames of S tokens is cut along one of these
    dimensions, and each block of a factorised model runs along the other, with no communication in it.

    Between a spatial and a temporal block, `switch` cuts the other dimension with one all-to-all of the
    tensor itself; Ulysses trades queries, keys, values and outputs in each block. Sizes need not divide by
    the ranks; a rank may hold nothing.
    """

    def __init__(self, mesh: DeviceMesh, *, axis: str = "head") -> None:
        self.group = axis_group(mesh, axis)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.traffic = Traffic()

    def sizes(self, length: int) -> list[int]:
        """How much of a dimension of `length` each rank holds when it is cut: as even as can be."""
        cuts = [length * r // self.size for r in range(self.size + 1)]
        return [b - a for a, b in zip(cuts, cuts[1:], strict=False)]

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of the whole tensor, cut along `dim`."""
        return x.split(self.sizes(x.shape[dim]), dim)[self.rank]

    def switch(self, x: Tensor, *, join: int, cut: int, length: int) -> Tensor:
        """From cut along dimension `join`, which has `length` over all ranks, to cut along `cut`.

        Differentiable: the gradient is switched back. Every rank calls it, also one that holds nothing.
        ValueError if x is not this rank's part.
        """
        join, cut = join % x.ndim, cut % x.ndim
        if join == cut or x.shape[join] != self.sizes(length)[self.rank]:
            raise ValueError(
                f"rank {self.rank} of {self.size} holds {x.shape[join]} of {length} along dimension {join}, "
                f"to be cut along {cut}: it must hold {self.sizes(length)[self.rank]}, and cut another"
            )
        whole: Tensor = _Switch.apply(x, self, join, cut, length, x.shape[cut])
        return whole

    def moved(self, x: Tensor, join: int, cut: int, lengths: tuple[int, int]) -> Tensor:
        """`switch` without autograd; lengths: of both dimensions over all ranks."""
        held, parts = self.sizes(lengths[0]), self.sizes(lengths[1])
        pieces = [[part.contiguous()] for part in x.split(parts, cut)]
        shapes = []
        for n in held:
            shape = list(x.shape)
            shape[join], shape[cut] = n, parts[self.rank]
            shapes.append([tuple(shape)])
        return torch.cat([part[0] for part in trade(self.group, pieces, shapes, self.traffic)], join)


class _Switch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: Axes, join: int, cut: int, joined: int, whole: int) -> Tensor:
        ctx.rest = axes, join, cut, joined, whole
        return axes.moved(x, join, cut, (joined, whole))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        axes, join, cut, joined, whole = ctx.rest
        return axes.moved(grad, cut, join, (whole, joined)), None, None, None, None, None
