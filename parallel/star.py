"""Star attention: context blocks attend locally and to the anchor; for the dense tail, queries travel to the
keys.

Acharya, Jia, Ginsburg 2024, sections 2.1 and 2.2, made a layout for training: gradients flow into the anchor
and, through the tail, into the whole context. The mask says what is seen; this serves those that are
star-shaped and refuses others.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..kernels.attention import backward, combine, forward, nothing, partial_dtype
from ..kernels.concrete import concrete
from ..kernels.heads import PerHead
from ..kernels.mask import And, Bound, Documents, Mask, Or, Unsupported
from ..kernels.options import AttentionOptions
from ..kernels.patterns import Anchored
from ..kernels.span import Span, Spans, cut, total
from .balance import heads_of
from .comm import Edge, Traffic, post
from .halves import Joined, Saved, Triple
from .mesh import axis_group
from .needs import meets
from .placement import Placement


class Parts(NamedTuple):
    """One rank's share: how many of its tokens are context (held first), and how many of those belong to
    the anchor.
    """

    context: int
    anchor: int


@lru_cache(maxsize=64)
@concrete
def parts(mask: Mask, placement: Placement, kv_heads: int) -> tuple[Parts, ...]:
    """The share of each rank. Unsupported if a context query may see a key that is neither here nor in
    the anchor.
    """
    star = shape(mask)
    found = []
    for r, spans in enumerate(placement.spans_by_rank):
        starts = [s.start for s in spans]
        if starts != sorted(starts) or not all(s.contiguous for s in spans):
            raise Unsupported(
                f"parallel=star needs a rank's tokens in their order, but rank {r} has {spans[:4]}; take "
                f"the placement that Star.place gives, or parallel=s2 or parallel=ring, which serve every one"
            )
        ends = star.context, min(star.anchor, star.context)
        found.append(Parts(*(sum(max(0, min(s.last + 1, end) - s.start) for s in spans) for end in ends)))
    near, rest = [], []
    for spans, part in zip(placement.spans_by_rank, found, strict=True):
        near.append(cut(spans, 0, part.context))
        rest.append(cut(spans, part.anchor, total(spans)))
    far = meets(mask, near, rest, kv_heads, tile=star.block).fill_diagonal_(False).nonzero()
    if len(far):
        r, s = far[0].tolist()
        raise Unsupported(
            f"parallel=star: under {mask} context on rank {r} may see keys of rank {s} beyond the "
            f"anchor; take a mask like mask=star and the placement of Star.place, or parallel=s2 or "
            f"parallel=ring, which serve every mask"
        )
    return tuple(found)


def shape(mask: Mask) -> Anchored:
    """The star in a mask. Unsupported if there is none, or more than one."""
    stars = set(_stars(mask))
    if len(stars) != 1:
        raise Unsupported(
            f"parallel=star serves masks that hold one Anchored, as mask=star does; {mask} holds "
            f"{len(stars)}: take parallel=s2 or parallel=ring, which serve every mask"
        )
    return stars.pop()


def _stars(mask: Mask | None) -> Iterator[Anchored]:
    if isinstance(mask, Anchored):
        yield mask
    elif isinstance(mask, And | Or):
        yield from _stars(mask.left)
        yield from _stars(mask.right)
    elif isinstance(mask, PerHead):
        for one in mask.masks:
            yield from _stars(one)
    elif isinstance(mask, Documents):
        yield from _stars(mask.inner)
    elif isinstance(mask, Bound):
        yield from _stars(mask.mask)


class Star(Joined):
    """O(anchor + tail) is sent, whatever the length of the context."""

    def __init__(self, mesh: DeviceMesh, *, axis: str = "ring") -> None:
        self.group = axis_group(mesh, axis)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.traffic = Traffic()

    def place(self, length: int, mask: Mask) -> Placement:
        """The context cut at block borders only, the tail spread evenly over all ranks."""
        star = shape(mask)
        context = min(star.context, length)
        blocks = -(-context // star.block)
        edges = [min(blocks * r // self.size * star.block, context) for r in range(self.size + 1)]
        tail = [context + (length - context) * r // self.size for r in range(self.size + 1)]
        spans = []
        for r in range(self.size):
            pieces = ((edges[r], edges[r + 1]), (tail[r], tail[r + 1]))
            spans.append(tuple(Span(a, b - a) for a, b in pieces if b > a))
        placement = Placement(length, tuple(spans))
        # k, which knows, is not at hand: attention asks again
        parts(mask, placement, heads_of(mask))
        return placement

    def refuse(self, mask: Mask, placement: Placement, kv_heads: int) -> None:
        """See `Halves.refuse`: masks and placements that `parts` does not take."""
        parts(mask, placement, kv_heads)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, options: AttentionOptions
    ) -> tuple[Tensor, Tensor | None, Saved]:
        turn = _Turn(self, mask, placement, k.shape[2])
        here, kv, at = turn.here, *turn.with_anchor(torch.stack((k, v)))
        near = forward(q[:, :here], kv[0], kv[1], mask, turn.near, at, options=options)
        far = self._tail_forward(turn, q, k, v, options)
        out, lse = torch.cat((near[0], far[0]), 1), None
        if near[1] is not None and far[1] is not None:
            lse = torch.cat((near[1], far[1]), 2)
        return out, lse, (q, k, v, lse)

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
        turn = _Turn(self, mask, placement, k.shape[2])
        here, kv, at = turn.here, *turn.with_anchor(torch.stack((k, v)))
        rows = [None if x is None else x[:, :, :here] for x in (delta, lse)]
        near = backward(
            dout[:, :here], rows[0], q[:, :here], kv[0], kv[1], rows[1], mask, turn.near, at, options=options
        )
        dkv = turn.anchor_home(torch.stack(near[1:]))
        far = self._tail_backward(turn, dout, delta, saved, options)
        dkv += torch.stack(far[1:])
        return torch.cat((near[0], far[0]), 1), dkv[0], dkv[1]

    def _tail_forward(
        self, turn: "_Turn", q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
    ) -> tuple[Tensor, Tensor | None]:
        """The tail's queries go to every rank; (out, lse) over that rank's keys come back and are merged
        in rank order.
        """
        queries = turn.everywhere(q[:, turn.here :])
        found = [
            forward(x, k, v, turn.mask, at, turn.mine, options=options)
            for x, at in zip(queries, turn.tails, strict=True)
        ]
        outs = turn.returned([out for out, _ in found], q.shape[1] - turn.here)
        row = nothing(q[:, turn.here :], options)
        if options.normalizer == "sigmoid":
            return sum(outs, row[0]), None
        lses = turn.returned(
            [lse.transpose(1, 2) for _, lse in found if lse is not None], q.shape[1] - turn.here
        )
        for out, lse in zip(outs, lses, strict=True):
            row = combine(row, (out, lse.transpose(1, 2)))
        return row

    def _tail_backward(
        self, turn: "_Turn", dout: Tensor, delta: Tensor | None, saved: Saved, options: AttentionOptions
    ) -> Triple:
        q, k, v, lse = saved
        assert q is not None and k is not None and v is not None
        queries, upstream = turn.everywhere(q[:, turn.here :]), turn.everywhere(dout[:, turn.here :])
        rows = [
            [None] * self.size
            if x is None
            else [y.transpose(1, 2) for y in turn.everywhere(x.transpose(1, 2)[:, turn.here :])]
            for x in (delta, lse)
        ]
        dkv = torch.zeros((2, *k.shape), dtype=partial_dtype(q), device=q.device)
        grads = []
        for x, g, d, s, at in zip(queries, upstream, *rows, turn.tails, strict=True):
            part = backward(g, d, x, k, v, s, turn.mask, at, turn.mine, options=options)
            grads.append(part[0])
            dkv += torch.stack(part[1:])
        dq = torch.zeros_like(q[:, turn.here :], dtype=dkv.dtype)
        for part_q in turn.returned(grads, q.shape[1] - turn.here):
            dq += part_q
        return dq, dkv[0], dkv[1]


class _Turn:
    """The transfers of one pass, as one rank sees them."""

    def __init__(self, star: Star, mask: Mask, placement: Placement, kv_heads: int) -> None:
        self.star, self.mask, self.placement = star, mask, placement
        self.parts = parts(mask, placement, kv_heads)
        self.mine = placement.spans_by_rank[star.rank]
        self.others = [r for r in range(star.size) if r != star.rank]
        self.here = self.parts[star.rank].context
        self.near = cut(self.mine, 0, self.here)
        self.tails = [
            cut(s, p.context, total(s)) for s, p in zip(placement.spans_by_rank, self.parts, strict=True)
        ]

    def with_anchor(self, kv: Tensor) -> tuple[Tensor, Spans]:
        """Own keys and, before them, the anchor of the other ranks: [2, B, keys, Hkv, D], and where they
        sit.
        """
        star = self.star
        own = kv[:, :, : self.parts[star.rank].anchor].contiguous()
        arrivals = [
            (kv.new_empty((*kv.shape[:2], self.parts[s].anchor, *kv.shape[3:])), s) for s in self.others
        ]
        sends = [(own, r) for r in self.others if self.parts[r].context]
        wanted = arrivals if self.here else []
        post(star.group, sends, wanted, star.traffic).wait()
        at: Spans = ()
        for _, s in wanted:
            at += cut(self.placement.spans_by_rank[s], 0, self.parts[s].anchor)
        return torch.cat([*(x for x, _ in wanted), kv], 2), at + self.mine

    def anchor_home(self, grad: Tensor) -> Tensor:
        """Gradients of the anchor back to its owners: those of the keys held here, [2, B, N, Hkv, D]."""
        star = self.star
        owners = self.others if self.here else []
        *anchors, own = grad.split([*(self.parts[s].anchor for s in owners), total(self.mine)], 2)
        own = own.contiguous()
        sends = [(part.contiguous(), s) for part, s in zip(anchors, owners, strict=True)]
        mine = self.parts[star.rank].anchor
        users = [r for r in self.others if self.parts[r].context]
        arrivals: list[Edge] = [(grad.new_empty((*grad.shape[:2], mine, *grad.shape[3:])), r) for r in users]
        post(star.group, sends, arrivals, star.traffic).wait()
        for part, _ in arrivals:
            own[:, :, :mine] += part
        return own

    def everywhere(self, x: Tensor) -> list[Tensor]:
        """The tail's rows [B, tail, ...] of every rank, on every rank, by rank."""
        star, own = self.star, x.contiguous()
        rows = [
            own if r == star.rank else x.new_empty((x.shape[0], total(t), *x.shape[2:]))
            for r, t in enumerate(self.tails)
        ]
        arrivals = [(rows[r], r) for r in self.others]
        post(star.group, [(own, r) for r in self.others], arrivals, star.traffic).wait()
        return rows

    def returned(self, results: list[Tensor], tokens: int) -> list[Tensor]:
        """What each rank made of this rank's tail, by rank; results[r] is what was made here of rank r's."""
        star = self.star
        shape = (results[0].shape[0], tokens, *results[0].shape[2:])
        found = [results[r] if r == star.rank else results[r].new_empty(shape) for r in range(star.size)]
        sends = [(results[r].contiguous(), r) for r in self.others]
        post(star.group, sends, [(found[r], r) for r in self.others], star.traffic).wait()
        return found
