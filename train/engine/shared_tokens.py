"""Tokens that the ranks of a tensor-parallel axis share: cut where each is worked on by itself, joined where
every rank works on all of them with its part of the weights.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# torch before 2.13 knows only the older names, of which later ones warn
_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class SharedTokens:
    """Sequence parallelism inside tensor parallelism (Korthikanti et al. 2022, section 4.2.2): of activations
    [B, T, C] each rank of `group` holds [B, n, C], n the same on all; what is beyond T is padding of zeros.

    length: T, known since the last `cut`.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.length = 0

    def cut(self, x: Tensor) -> Tensor:
        """[B, T, C], the same on all ranks -> [B, n, C]. The gradient is joined."""
        self.length = x.shape[1]
        own: Tensor = _Moved.apply(x, self._own, self._join)
        return own

    def join(self, x: Tensor) -> Tensor:
        """[B, n, C] -> [B, T, C] on all ranks. Their gradients are addends: they are summed, and cut."""
        whole: Tensor = _Moved.apply(x, self._join, self._sum)
        return whole

    def sum(self, x: Tensor) -> Tensor:
        """Addends [B, T, C], one a rank -> this rank's [B, n, C] of their sum. The gradient is joined."""
        own: Tensor = _Moved.apply(x, self._sum, self._join)
        return own

    def total(self, x: Tensor) -> Tensor:
        """Addends, one a rank -> their sum on all ranks. The gradient, the same on all, is that of each."""
        whole: Tensor = _Moved.apply(x, self._total, lambda grad: grad)
        return whole

    def _padded(self, x: Tensor) -> Tensor:
        """[B, size * n, C]."""
        return F.pad(x, (0, 0, 0, -x.shape[1] % self.size))

    def _own(self, x: Tensor) -> Tensor:
        # a copy, else the whole stays as long as its part
        return self._padded(x).chunk(self.size, 1)[self.rank].clone() if x.numel() else x

    def _join(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        parts = x.new_empty(self.size * len(x), *x.shape[1:])
        _gather(parts, x.contiguous(), group=self.group)
        whole = parts.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1, 2)
        return whole[:, : self.length]

    def _sum(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x
        parts = self._padded(x).unflatten(1, (self.size, -1)).transpose(0, 1).flatten(0, 1)
        own = parts.new_empty(len(x), *parts.shape[1:])
        _scatter(own, parts, group=self.group)
        return own

    def _total(self, x: Tensor) -> Tensor:
        whole = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=self.group)
        return whole


class _Moved(torch.autograd.Function):
    """there(x), with back(gradient)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(grad), None, None
