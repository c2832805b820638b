"""Context sharded across heads: each rank fetches, per kv head, only the key blocks that its queries may see.

S2 (Lin et al. 2024) is the best case, where each head sees its own stride of the context; windows, sinks,
documents and neighbourhoods profit alike, since nothing here knows what the mask is: it is the general sparse
exchange.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..kernels.attention import backward, forward, partial_dtype
from ..kernels.concrete import concrete
from ..kernels.mask import Mask
from ..kernels.options import AttentionOptions
from ..kernels.span import Spans, compress, positions
from .comm import Traffic, exchange
from .halves import Joined, Saved, Triple
from .mesh import axis_group
from .needs import blocks_met, tiled
from .pairs import as_pair, tokens_first
from .placement import Placement, named

ROWS = 128  # queries whose bounds are classified together


class Needs(NamedTuple):
    """What one rank needs and gives, for each group of kv heads that need the same."""

    heads: tuple[range, ...]  # kv heads of each group
    wants: tuple[tuple[int, ...], ...]  # [group][rank]: how many of that rank's tokens
    gives: tuple[tuple[int, ...], ...]  # [group][rank]: how many of this rank's tokens
    given: tuple[Tensor, ...]  # [group]: which these are, for rank after rank, int64
    at: tuple[Spans, ...]  # where each group's keys sit, in the order in which they come


@lru_cache(maxsize=64)
@concrete
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
    heads = tuple(range(h, h + 1) for h in range(kv_heads)) if len(given) > 1 else (range(kv_heads),)
    whole = torch.cat([positions(s) for s in spans])
    return Needs(
        heads,
        wants=tuple(tuple(int(w[g].sum()) for w in wanted) for g in range(len(given))),
        gives=tuple(tuple(one.sum(1).tolist()) for one in given),
        given=tuple(one.nonzero()[:, 1].to(device) for one in given),
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
            out, lse = forward(q[:, :, rows], *as_pair(kv), bound, mine, at, options=options)
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
                *as_pair(kv),
                row[1],
                bound,
                mine,
                at,
                options=options,
            )
            dq[:, :, rows] = part[0]
            grads.append(tokens_first(part[1], part[2]))
            # else they would be alive while gradients travel
            del kv, part
        dkv = torch.zeros((k.shape[1], 2, k.shape[0], *k.shape[2:]), dtype=dtype, device=q.device)
        self._give_back(grads, dkv, plan)
        return dq, *as_pair(dkv)

    def _fetch(self, k: Tensor, v: Tensor, plan: Needs) -> Iterator[Tensor]:
        """The keys and values of each group as they sit at plan.at: [tokens, 2, B, heads, D]."""
        kv = tokens_first(k, v)
        offered = [
            kv[:, :, :, heads.start : heads.stop].index_select(0, given)
            for heads, given in zip(plan.heads, plan.given, strict=True)
        ]
        del kv
        return self._by_group(offered, plan.gives, plan.wants)

    def _give_back(self, grads: list[Tensor], dkv: Tensor, plan: Needs) -> None:
        """Adds to dkv [N, 2, B, Hkv, D] the gradients of the keys held here from every rank that saw them,
        in rank order.
        """
        for heads, given, gives, found in zip(
            plan.heads, plan.given, plan.gives, self._by_group(grads, plan.wants, plan.gives), strict=True
        ):
            mine = dkv[:, :, :, heads.start : heads.stop]
            for index, part in zip(given.split(gives), found.split(gives), strict=True):
                mine.index_add_(0, index, part)

    def _by_group(
        self, groups: list[Tensor], sends: Sequence[Sequence[int]], comes: Sequence[Sequence[int]]
    ) -> Iterator[Tensor]:
        """One all-to-all of the tokens of all groups, [tokens, 2, B, heads, D] from rank after rank, of which
        sends[group][rank] go out and comes[group][rank] arrive. A single group stays where it arrives, of
        several only one at a time is put together.
        """
        shapes = [x.shape[1:] for x in groups]
        out, back = (
            [
                [n * shape.numel() for n, shape in zip(each, shapes, strict=True)]
                for each in zip(*counts, strict=True)
            ]
            for counts in (sends, comes)
        )
        flat = groups[0].reshape(-1)
        if len(groups) > 1:
            parts = [x.split(tuple(n)) for x, n in zip(groups, sends, strict=True)]
            flat = torch.cat([x.reshape(-1) for each in zip(*parts, strict=True) for x in each])
            del parts
        # what goes out lives no longer than the exchange
        groups.clear()
        came = exchange(self.group, flat, [*map(sum, out)], [*map(sum, back)], self.traffic)
        del flat
        if len(shapes) == 1:
            yield came.view(-1, *shapes[0])
            return
        pieces = came.split([n for each in back for n in each])
        for group, shape in enumerate(shapes):
            yield torch.cat(pieces[group :: len(shapes)]).view(-1, *shape)
