"""What a way of spreading one sequence over ranks must answer, and cutting tensors by it."""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.mask import Mask
from ..kernels.options import AttentionOptions
from ..kernels.span import positions as span_positions
from .comm import Traffic
from .joint import Joint
from .placement import Placement

DEFAULT = AttentionOptions()


class Layout(Protocol):
    """Attention over a sequence that `size` ranks hold together; `rank` is this one's place among them.

    `attention` gives for the tokens held here exactly what one device would give with the same mask, or
    raises `Unsupported`.
    """

    rank: int
    size: int
    traffic: Traffic

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks of one sequence, in the order of the placement; None for one rank alone."""
        ...

    def place(self, length: int, mask: Mask) -> Placement:
        """Who holds what of `length` positions; lengths need not divide by anything, a rank may hold
        nothing.
        """
        ...

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        placement: Placement,
        *,
        options: AttentionOptions = DEFAULT,
        joint: Joint | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Local q [B, N, Hq, D], k, v [B, N, Hkv, D] -> (out like q, lse [B, Hq, N] or None for sigmoid),
        differentiable; with J joint tokens their rows come first, [B, J + N, Hq, D] and [B, Hq, J + N].

        Each joint token sees every token, joint or not, and is seen by every query, whatever the mask, which
        is about the sequence alone. Their rows are the same bits on every rank. *Gradients of what is
        replicated are shares.* Upstream: the loss is the sum of the ranks' losses, so a rank gives what its
        own loss makes of the joint rows (zeros, if another rank's takes them), and it is summed over the
        ranks here. Downstream: the gradients of joint.q, k and v are this rank's share; their sum over the
        ranks is the whole, which an engine makes that sums parameter gradients over the ranks of a sequence.
        """
        ...


def positions(layout: Layout, placement: Placement, device: torch.device | None = None) -> Tensor:
    """Global positions of the tokens held here, in their order: int64 [tokens]."""
    return span_positions(placement.spans_by_rank[layout.rank], device)


def shard(layout: Layout, x: Tensor, placement: Placement, dim: int) -> Tensor:
    """The part of the whole tensor `x` that this rank holds, cut along the token dimension `dim`."""
    if x.shape[dim] != placement.length:
        raise ValueError(f"dim {dim} has {x.shape[dim]} tokens, but the placement is for {placement.length}")
    return x.index_select(dim, positions(layout, placement, x.device))


def unshard(layout: Layout, x: Tensor, placement: Placement, dim: int) -> Tensor:
    """The whole tensor in global order, on every rank, from the local parts. Not differentiable."""
    if layout.group is None:
        parts = [x]
    else:
        shape = list(x.shape)
        parts = []
        for rank in range(layout.size):
            shape[dim] = placement.tokens(rank)
            parts.append(x.contiguous() if rank == layout.rank else x.new_empty(shape))
        for rank, part in enumerate(parts):
            dist.broadcast(part, dist.get_global_rank(layout.group, rank), group=layout.group)
    at = torch.cat([span_positions(spans, x.device) for spans in placement.spans_by_rank])
    return torch.cat(parts, dim).index_select(dim, at.argsort())
