"""Context sharded across heads: each rank fetches, per kv head, only the key blocks that its queries may see.

S2 (Lin et al. 2024) is the best case, where each head sees its own stride of the context; windows, sinks,
documents and neighbourhoods profit alike, since nothing here knows what the mask is: it is the general sparse
exchange.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..kernels.attention import backward, forward, partial_dtype
from ..kernels.mask import Mask, Range
from ..kernels.options import AttentionOptions
from ..kernels.span import Spans, bounds, compress, positions
from ..kernels.tile import classify
from .comm import Traffic, trade
from .halves import Joined, Saved, Triple
from .placement import Placement, named

ROWS = 128  # queries whose bounds are classified together


class Needs(NamedTuple):
    """What one rank needs and gives, for each group of kv heads that need the same: indices of held
    tokens, int64.
    """

    heads: tuple[range, ...]  # kv heads of each group
    wants: tuple[tuple[Tensor, ...], ...]  # [group][rank]: of that rank's tokens
    gives: tuple[tuple[Tensor, ...], ...]  # [group][rank]: of this rank's tokens
    at: tuple[Spans, ...]  # where each group's keys sit, in the order in which they come


def needed_tokens(mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int, block: int) -> Tensor:
    """Which held keys some query may see, whole blocks at a time: bool [1 or kv heads, keys]."""
    k = sum(s.length for s in at_k)
    heads = kv_heads if mask.per_head else 1
    if not k or not sum(s.length for s in at_q):
        return torch.zeros(heads, k, dtype=torch.bool)
    some, _ = classify(mask, Range(*bounds(at_q, ROWS)), Range(*bounds(at_k, block)), kv_heads)
    return some.any(2).any(0).repeat_interleave(block, -1)[:, :k]


@lru_cache(maxsize=64)
def needs(mask: Mask, placement: Placement, kv_heads: int, rank: int, block: int) -> Needs:
    """The exchange as `rank` sees it; every rank derives both ends of each transfer from the same values."""
    spans, size = placement.spans_by_rank, placement.size
    wanted = [needed_tokens(mask, spans[rank], spans[s], kv_heads, block) for s in range(size)]
    given = [needed_tokens(mask, spans[r], spans[rank], kv_heads, block) for r in range(size)]
    heads = tuple(range(h, h + 1) for h in range(kv_heads)) if len(wanted[0]) > 1 else (range(kv_heads),)
    wants = tuple(tuple(w[g].nonzero().flatten() for w in wanted) for g in range(len(heads)))
    gives = tuple(tuple(w[g].nonzero().flatten() for w in given) for g in range(len(heads)))
    held = [positions(s) for s in spans]
    at = tuple(compress(torch.cat([held[s][one[s]] for s in range(size)])) for one in wants)
    return Needs(heads, wants, gives, at)


class HeadSharded(Joined):
    """Serves every mask; what it sends falls with what the mask needs. block: keys that are fetched
    together.
    """

    def __init__(
        self, mesh: DeviceMesh, *, axis: str = "ring", placement: str = "contiguous", block: int = 64
    ) -> None:
        if block < 1:
            raise ValueError(f"parallel.layout.block is {block}; it must be at least 1")
        self.group = mesh.get_group(axis)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.traffic, self.block = Traffic(), block
        self._place = named(placement)

    def place(self, length: int, mask: Mask) -> Placement:
        return self._place(length, self.size)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, options: AttentionOptions
    ) -> tuple[Tensor, Tensor | None, Saved]:
        plan = needs(mask, placement, k.shape[2], self.rank, self.block)
        mine, each = placement.spans_by_rank[self.rank], q.shape[2] // k.shape[2]
        outs, lses = [], []
        for heads, kv, at in zip(plan.heads, self._fetch(k, v, plan), plan.at, strict=True):
            rows = slice(heads.start * each, heads.stop * each)
            bound = mask.heads(heads, k.shape[2])
            out, lse = forward(q[:, :, rows], kv[0], kv[1], bound, mine, at, options=options)
            outs.append(out)
            lses.append(lse)
        whole = None if lses[0] is None else torch.cat([x for x in lses if x is not None], 1)
        return torch.cat(outs, 2), whole, (q, k, v, whole)

    def backward(
        self,
        dout: Tensor,
        delta: Tensor | None,
        saved: Saved,
        mask: Mask,
        placement: Placement,
        options: AttentionOptions,
    ) -> Triple:
        q, k, v, lse = saved
        assert q is not None and k is not None and v is not None
        plan = needs(mask, placement, k.shape[2], self.rank, self.block)
        mine, each, dtype = placement.spans_by_rank[self.rank], q.shape[2] // k.shape[2], partial_dtype(q)
        dq, grads = torch.empty(q.shape, dtype=dtype, device=q.device), []
        for heads, kv, at in zip(plan.heads, self._fetch(k, v, plan), plan.at, strict=True):
            rows = slice(heads.start * each, heads.stop * each)
            bound = mask.heads(heads, k.shape[2])
            row = [None if x is None else x[:, rows] for x in (delta, lse)]
            part = backward(
                dout[:, :, rows],
                row[0],
                q[:, :, rows],
                kv[0],
                kv[1],
                row[1],
                bound,
                mine,
                at,
                options=options,
            )
            dq[:, :, rows] = part[0]
            grads.append(torch.stack(part[1:]))
        dkv = torch.zeros((2, *k.shape), dtype=dtype, device=q.device)
        self._give_back(grads, dkv, plan)
        return dq, dkv[0], dkv[1]

    def _fetch(self, k: Tensor, v: Tensor, plan: Needs) -> list[Tensor]:
        """Keys and values of each group, [2, B, needed, group's heads, D], in one all-to-all."""
        pieces: list[list[Tensor]] = [[] for _ in range(self.size)]
        shapes: list[list[tuple[int, ...]]] = [[] for _ in range(self.size)]
        for heads, wants, gives in zip(plan.heads, plan.wants, plan.gives, strict=True):
            own = torch.stack((k[:, :, heads.start : heads.stop], v[:, :, heads.start : heads.stop]))
            for peer in range(self.size):
                pieces[peer].append(own.index_select(2, gives[peer].to(k.device)))
                shapes[peer].append((*own.shape[:2], len(wants[peer]), *own.shape[3:]))
        got = trade(self.group, pieces, shapes, self.traffic)
        return [torch.cat(parts, 2) for parts in zip(*got, strict=True)]

    def _give_back(self, grads: list[Tensor], dkv: Tensor, plan: Needs) -> None:
        """Adds to dkv [2, B, N, Hkv, D] the gradients of the keys held here from every rank that saw
        them, in rank order.
        """
        pieces: list[list[Tensor]] = [[] for _ in range(self.size)]
        shapes: list[list[tuple[int, ...]]] = [[] for _ in range(self.size)]
        for grad, wants, gives in zip(grads, plan.wants, plan.gives, strict=True):
            for peer, part in enumerate(grad.split([len(w) for w in wants], 2)):
                pieces[peer].append(part)
                shapes[peer].append((*grad.shape[:2], len(gives[peer]), *grad.shape[3:]))
        for peer, parts in enumerate(trade(self.group, pieces, shapes, self.traffic)):
            for group, (heads, part) in enumerate(zip(plan.heads, parts, strict=True)):
                at = plan.gives[group][peer].to(dkv.device)
                dkv[:, :, :, heads.start : heads.stop].index_add_(2, at, part)
