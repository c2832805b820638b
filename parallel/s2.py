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
from ..kernels.mask import Mask
from ..kernels.options import AttentionOptions
from ..kernels.span import Spans, compress, positions
from .comm import Traffic, trade
from .halves import Joined, Saved, Triple
from .mesh import axis_group
from .needs import blocks_met, tiled
from .placement import Placement, named

ROWS = 128  # queries whose bounds are classified together


class Needs(NamedTuple):
    """What one rank needs and gives, for each group of kv heads that need the same."""

    heads: tuple[range, ...]  # kv heads of each group
    wants: tuple[tuple[int, ...], ...]  # [group][rank]: how many of that rank's tokens
    gives: tuple[tuple[int, ...], ...]  # [group][rank]: how many of this rank's tokens; 0 to itself
    given: tuple[Tensor, ...]  # [group]: which these are, for rank after rank, int64
    kept: tuple[Tensor, ...]  # [group]: which of its own tokens the rank needs, int64
    at: tuple[Spans, ...]  # where each group's keys sit, in the order in which they come


@lru_cache(maxsize=64)
def needs(
    mask: Mask, placement: Placement, kv_heads: int, rank: int, block: int, device: torch.device
) -> Needs:
    """The exchange as `rank` sees it; every rank derives both ends of each transfer from the same values."""
    spans = placement.spans_by_rank
    tokens = [placement.tokens(r) for r in range(placement.size)]
    blocks = [-(-n // block) for n in tokens]
    met = blocks_met(mask, tiled((spans[rank],), ROWS), tiled(spans, block), kv_heads)[0]
    wanted = [_tokens(x, block, n) for x, n in zip(met.split(blocks, 1), tokens, strict=True)]
    met = blocks_met(mask, tiled(spans, ROWS), tiled((spans[rank],), block), kv_heads)
    given = _tokens(met, block, tokens[rank]).transpose(0, 1)  # [heads, ranks, tokens]
    kept = given[:, rank].clone()
    given[:, rank] = False
    heads = tuple(range(h, h + 1) for h in range(kv_heads)) if len(given) > 1 else (range(kv_heads),)
    whole = torch.cat([positions(s) for s in spans])
    return Needs(
        heads,
        wants=tuple(tuple(int(w[g].sum()) for w in wanted) for g in range(len(given))),
        gives=tuple(tuple(one.sum(1).tolist()) for one in given),
        given=tuple(one.nonzero()[:, 1].to(device) for one in given),
        kept=tuple(one.nonzero()[:, 0].to(device) for one in kept),
        at=tuple(compress(whole[torch.cat([w[g] for w in wanted])]) for g in range(len(given))),
    )


def _tokens(blocks: Tensor, block: int, tokens: int) -> Tensor:
    """bool [..., blocks] -> bool [..., tokens]."""
    return blocks.repeat_interleave(block, -1)[..., :tokens]


class HeadSharded(Joined):
    """Serves every mask; what it sends falls with what the mask needs. block: keys that are fetched
    together.
    """

    def __init__(
        self, mesh: DeviceMesh, *, axis: str = "ring", placement: str = "contiguous", block: int = 64
    ) -> None:
        if block < 1:
            raise ValueError(f"parallel.layout.block is {block}; it must be at least 1")
        self.group = axis_group(mesh, axis)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.traffic, self.block = Traffic(), block
        self._place = named(placement)

    def place(self, length: int, mask: Mask) -> Placement:
        return self._place(length, self.size, mask)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, options: AttentionOptions
    ) -> tuple[Tensor, Tensor | None, Saved]:
        plan = needs(mask, placement, k.shape[2], self.rank, self.block, k.device)
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
        plan = needs(mask, placement, k.shape[2], self.rank, self.block, k.device)
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
        shapes = [
            [
                (2, k.shape[0], 0 if peer == self.rank else wants[peer], len(heads), k.shape[3])
                for heads, wants in zip(plan.heads, plan.wants, strict=True)
            ]
            for peer in range(self.size)
        ]
        # what is offered lives no longer than the trade
        got = trade(self.group, self._offered(k, v, plan), shapes, self.traffic)
        got[self.rank] = [_pick(k, v, heads, i) for heads, i in zip(plan.heads, plan.kept, strict=True)]
        return [torch.cat(parts, 2) for parts in zip(*got, strict=True)]

    def _offered(self, k: Tensor, v: Tensor, plan: Needs) -> list[list[Tensor]]:
        """What goes to each rank, group by group."""
        groups = [
            _pick(k, v, heads, given).split(gives, 2)
            for heads, gives, given in zip(plan.heads, plan.gives, plan.given, strict=True)
        ]
        return [list(parts) for parts in zip(*groups, strict=True)]

    def _give_back(self, grads: list[Tensor], dkv: Tensor, plan: Needs) -> None:
        """Adds to dkv [2, B, N, Hkv, D] the gradients of the keys held here from every rank that saw
        them, in rank order.
        """
        parts = [grad.split(wants, 2) for grad, wants in zip(grads, plan.wants, strict=True)]
        own = [part[self.rank] for part in parts]
        pieces = [
            [part[peer][:, :, :0] if peer == self.rank else part[peer] for part in parts]
            for peer in range(self.size)
        ]
        shapes = [
            [
                (*grad.shape[:2], gives[peer], *grad.shape[3:])
                for grad, gives in zip(grads, plan.gives, strict=True)
            ]
            for peer in range(self.size)
        ]
        at = [list(given.split(gives)) for given, gives in zip(plan.given, plan.gives, strict=True)]
        for peer, found in enumerate(trade(self.group, pieces, shapes, self.traffic)):
            for group, heads in enumerate(plan.heads):
                here = peer == self.rank
                index = plan.kept[group] if here else at[group][peer]
                mine = dkv[:, :, :, heads.start : heads.stop]
                mine.index_add_(2, index, own[group] if here else found[group])


def _pick(k: Tensor, v: Tensor, heads: range, tokens: Tensor) -> Tensor:
    """Keys and values of some heads and tokens: [2, B, tokens, heads, D]."""
    both = torch.stack((k[:, :, heads.start : heads.stop], v[:, :, heads.start : heads.stop]))
    return both.index_select(2, tokens)
