"""Trade sequence for heads, attend, trade back (DeepSpeed Ulysses, Jacobs et al. 2023); over a ring it is
USP.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..kernels.attention import partial_dtype
from ..kernels.concrete import concrete
from ..kernels.mask import Mask
from ..kernels.options import AttentionOptions
from ..kernels.span import cut, total
from .comm import Traffic, trade
from .halves import Halves, Joined, Saved, Triple
from .layout import Layout
from .mesh import axis_group, joined
from .placement import Placement
from .single import Single


class InnerLayout(Layout, Halves, Protocol):
    """A layout that another one can call without autograd."""


class Share(NamedTuple):
    """The heads that one rank of the head axis computes: query heads, and the kv heads that they look at."""

    q: range
    kv: range

    def calls(self, each: int) -> list[tuple[slice, slice]]:
        """(kv heads, query heads), local indices: one call where the groups are equal, else one a kv head."""
        if not self.q:
            return []
        counts = [len(range(max(h * each, self.q.start), min((h + 1) * each, self.q.stop))) for h in self.kv]
        if len(set(counts)) == 1:
            return [(slice(0, len(self.kv)), slice(0, len(self.q)))]
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [
            (slice(i, i + 1), slice(end - n, end))
            for i, (n, end) in enumerate(zip(counts, ends, strict=True))
        ]


def shares(q_heads: int, kv_heads: int, size: int) -> list[Share]:
    """The heads of each of `size` ranks: as even as can be; a rank may have none, a kv head goes only
    where it is used.
    """
    each, found = q_heads // kv_heads, []
    for rank in range(size):
        q = range(q_heads * rank // size, q_heads * (rank + 1) // size)
        found.append(Share(q, range(q.start // each, (q.stop - 1) // each + 1) if q else range(0)))
    return found


class Ulysses(Joined):
    """Any head counts. `inner` attends over the other axis of the mesh (Ring: USP, Fang et al. 2024).

    chunks: the kv heads, with their query heads, are taken in so many rounds (as in UPipe), so that no more
    than 1 / chunks of what is traded is alive at a time, in forward and in backward: only the q, k, v, out
    and lse of the tokens held here are kept, and backward trades each round's q, k, v and lse once more. A
    single round has nothing to bound: it keeps what it traded, as much as the tokens held here take, and
    backward sends that much less.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        *,
        axis: str = "head",
        inner: Callable[[DeviceMesh], InnerLayout] = Single,
        chunks: int = 1,
    ) -> None:
        if chunks < 1:
            raise ValueError(f"parallel.layout.chunks is {chunks}; it must be at least 1")
        self.inner, self.chunks, self.traffic = inner(mesh), chunks, Traffic()
        self._heads = axis_group(mesh, axis)
        if self.inner.size > 1 and self.inner.group is self._heads:
            raise ValueError(
                f"parallel.layout.axis and parallel.layout.inner.axis are both {axis!r}; as in parallel=usp, "
                f"the one can be head and the other ring"
            )
        self.here, self.ways = dist.get_rank(self._heads), dist.get_world_size(self._heads)
        self.rank, self.size = self.inner.rank * self.ways + self.here, self.inner.size * self.ways
        self._traded = Traffic(self.traffic, [self.inner.rank * self.ways + i for i in range(self.ways)])
        self.inner.traffic = Traffic(
            self.traffic, [r * self.ways + self.here for r in range(self.inner.size)]
        )
        self.group = self._heads if self.inner.size == 1 else _sequence(mesh, self.inner.group, axis)

    def place(self, length: int, mask: Mask) -> Placement:
        """What the inner layout gives to a rank, cut into one part for each rank of the head axis."""
        whole = self.inner.place(length, mask)
        parts = []
        for spans in whole.spans_by_rank:
            n = total(spans)
            parts += [cut(spans, n * i // self.ways, n * (i + 1) // self.ways) for i in range(self.ways)]
        return Placement(length, tuple(parts))

    def refuse(self, mask: Mask, placement: Placement, kv_heads: int) -> None:
        """See `Halves.refuse`: what the inner layout does not take, of all heads, here or elsewhere."""
        self.inner.refuse(mask, _inner(placement, self.ways), kv_heads)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, options: AttentionOptions
    ) -> tuple[Tensor, Tensor | None, Saved]:
        """Whole rows, into which nothing will be merged any more: they travel in q's dtype."""
        return self._turn(q, k, v, mask, placement, options, q.dtype)

    def partial(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, options: AttentionOptions
    ) -> tuple[Tensor, Tensor | None, Saved]:
        return self._turn(q, k, v, mask, placement, options, partial_dtype(q))

    def _turn(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, options: AttentionOptions,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None, Saved]:  # fmt: skip
        rounds, lses = self._rounds(q.shape[2], k.shape[2]), []
        whole, kept = q.new_empty(q.shape, dtype=dtype), []
        for kv, heads in rounds:
            bound, qkv = mask.heads(kv, k.shape[2]), _of_round(q, k, v, kv, heads)
            whole[:, :, heads], lse, inner = self._forward(qkv, bound, placement, options, dtype)
            lses.append(lse)
            if len(rounds) == 1:
                kept += inner
            # else it would be alive while the next round's heads come
            del inner
        lse = None if options.normalizer == "sigmoid" else torch.cat([x for x in lses if x is not None], 1)
        return whole, lse, (k[:, :0], *kept) if len(rounds) == 1 else (k, q, v, lse)

    def again(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, mask: Mask, placement: Placement
    ) -> Saved:
        if len(self._rounds(q.shape[2], k.shape[2])) > 1:
            return k, q, v, lse
        return k[:, :0], *self._again((q, k, v), lse, mask, placement)

    def backward(
        self,
        dout: Tensor,
        delta: Tensor | None,
        saved: Saved,
        mask: Mask,
        placement: Placement,
        options: AttentionOptions,
    ) -> Triple:
        # the first is k, or an empty slice of it: both tell how many heads there are in all
        like, *rest = saved
        assert like is not None
        kv_heads, dtype = like.shape[2], partial_dtype(dout)
        rounds = self._rounds(dout.shape[2], kv_heads)
        dq = torch.empty(dout.shape, dtype=dtype, device=dout.device)
        shape = (2, *dout.shape[:2], kv_heads, dout.shape[3])
        dkv = torch.empty(shape, dtype=dtype, device=dout.device)
        for kv, heads in rounds:
            bound, kept = mask.heads(kv, kv_heads), rest
            if len(rounds) > 1:
                q, v, lse = rest
                assert q is not None and v is not None
                part = None if lse is None else lse[:, heads]
                kept = self._again(_of_round(q, like, v, kv, heads), part, bound, placement)
            rows = dout[:, :, heads], None if delta is None else delta[:, heads], len(kv)
            grads = self._backward(rows, kept, bound, placement, options)
            dq[:, :, heads] = grads[0]
            dkv[0][:, :, kv.start : kv.stop], dkv[1][:, :, kv.start : kv.stop] = grads[1:]
            # else they would be alive while the next round's heads come
            del kept, grads
        return dq, dkv[0], dkv[1]

    def _forward(
        self, qkv: Sequence[Tensor], mask: Mask, placement: Placement, options: AttentionOptions,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:  # fmt: skip
        """One round: out in `dtype`, lse of the tokens held here, and what the inner calls keep."""
        kv_heads, (rows, _, heads, _) = qkv[1].shape[2], qkv[0].shape
        all_shares, tokens = shares(heads, kv_heads, self.ways), self._tokens(placement)
        me, inner = all_shares[self.here], _inner(placement, self.ways)
        q, k, v = self._arrived(qkv, tokens, all_shares)
        outs, lses = [q[:, :, :0].to(dtype)], []
        kept: list[Tensor | None] = []
        for kv, at in me.calls(heads // kv_heads):
            bound = mask.heads(me.kv[kv], kv_heads)
            out, lse, saved = self.inner.forward(q[:, :, at], k[:, :, kv], v[:, :, kv], bound, inner, options)
            outs.append(out.to(dtype))
            lses.append(lse)
            kept += saved
        out, lse = self._back(torch.cat(outs, 2), tokens, [s.q for s in all_shares], heads_dim=2), None
        if options.normalizer == "softmax":
            empty = torch.zeros((rows, 0, sum(tokens)), dtype=partial_dtype(q), device=q.device)
            found = torch.cat([empty, *(x for x in lses if x is not None)], 1)
            lse = self._back(found, tokens, [s.q for s in all_shares], heads_dim=1)
        return out, lse, kept

    def _again(
        self, qkv: Sequence[Tensor], lse: Tensor | None, mask: Mask, placement: Placement
    ) -> list[Tensor | None]:
        """What the inner calls of one round kept, traded once more."""
        kv_heads, heads, tokens = qkv[1].shape[2], qkv[0].shape[2], self._tokens(placement)
        all_shares, inner = shares(heads, kv_heads, self.ways), _inner(placement, self.ways)
        me = all_shares[self.here]
        q, k, v = self._arrived(qkv, tokens, all_shares)
        if lse is not None:
            lse = self._out(lse, tokens, [s.q for s in all_shares], heads_dim=1)
        kept: list[Tensor | None] = []
        for kv, at in me.calls(heads // kv_heads):
            bound, rows = mask.heads(me.kv[kv], kv_heads), None if lse is None else lse[:, at]
            kept += self.inner.again(q[:, :, at], k[:, :, kv], v[:, :, kv], rows, bound, inner)
        return kept

    def _arrived(self, qkv: Sequence[Tensor], tokens: list[int], all_shares: list[Share]) -> list[Tensor]:
        """q, k, v of all tokens and local heads, from those of local tokens and all heads."""
        (rows, _, _, dim), me = qkv[0].shape, all_shares[self.here]
        pieces = [
            [x[:, :, h.start : h.stop] for x, h in zip(qkv, (s.q, s.kv, s.kv), strict=True)]
            for s in all_shares
        ]
        shapes = [[(rows, n, len(h), dim) for h in (me.q, me.kv, me.kv)] for n in tokens]
        found = trade(self._heads, pieces, shapes, self._traded)
        return [torch.cat(x, 1) for x in zip(*found, strict=True)]

    def _backward(
        self, rows: tuple[Tensor, Tensor | None, int], saved: Sequence[Tensor | None], mask: Mask,
        placement: Placement,
        options: AttentionOptions,
    ) -> Triple:  # fmt: skip
        dout, delta, kv_heads = rows
        heads, tokens = dout.shape[2], self._tokens(placement)
        all_shares, inner = shares(heads, kv_heads, self.ways), _inner(placement, self.ways)
        me, dtype = all_shares[self.here], partial_dtype(dout)
        dout = self._out(dout, tokens, [s.q for s in all_shares], heads_dim=2)
        if delta is not None:
            delta = self._out(delta, tokens, [s.q for s in all_shares], heads_dim=1)
        shape = (dout.shape[0], sum(tokens), len(me.kv), dout.shape[3])
        dq, dkv = (
            torch.zeros_like(dout, dtype=dtype),
            torch.zeros((2, *shape), dtype=dtype, device=dout.device),
        )
        calls = me.calls(heads // kv_heads)
        each = len(saved) // max(1, len(calls))
        for i, (kv, at) in enumerate(calls):
            bound, part = mask.heads(me.kv[kv], kv_heads), None if delta is None else delta[:, at]
            kept = tuple(saved[i * each : (i + 1) * each])
            dq[:, :, at], dkv[0][:, :, kv], dkv[1][:, :, kv] = self.inner.backward(
                dout[:, :, at], part, kept, bound, inner, options
            )
        return self._home(dq, dkv, tokens, all_shares, kv_heads)

    def _home(
        self, dq: Tensor, dkv: Tensor, tokens: list[int], all_shares: list[Share], kv_heads: int
    ) -> Triple:
        """Gradients back to the ranks of the tokens, in float32; a kv head's are summed over the ranks
        that used it.
        """
        kinds = ((dq, "q"), (dkv[0], "kv"), (dkv[1], "kv"))
        pieces = [list(parts) for parts in zip(*(x.split(tokens, 1) for x, _ in kinds), strict=True)]
        rows, n, dim = dq.shape[0], tokens[self.here], dq.shape[3]
        shapes = [[(rows, n, len(getattr(s, kind)), dim) for _, kind in kinds] for s in all_shares]
        got = trade(self._heads, pieces, shapes, self._traded)
        whole = torch.zeros((2, rows, n, kv_heads, dim), dtype=dq.dtype, device=dq.device)
        for s, (_, dk, dv) in zip(all_shares, got, strict=True):
            whole[0][:, :, s.kv.start : s.kv.stop] += dk
            whole[1][:, :, s.kv.start : s.kv.stop] += dv
        return torch.cat([part[0] for part in got], 2), whole[0], whole[1]

    def _out(self, x: Tensor, tokens: list[int], heads: list[range], *, heads_dim: int) -> Tensor:
        """From local tokens of all heads to all tokens of local heads."""
        pieces = [[x.narrow(heads_dim, h.start, len(h))] for h in heads]
        shapes = [[self._shape(x, heads_dim, len(heads[self.here]), n)] for n in tokens]
        return torch.cat(
            [part[0] for part in trade(self._heads, pieces, shapes, self._traded)], 3 - heads_dim
        )

    def _back(self, x: Tensor, tokens: list[int], heads: list[range], *, heads_dim: int) -> Tensor:
        """From all tokens of local heads to local tokens of all heads."""
        pieces = [[part] for part in x.split(tokens, 3 - heads_dim)]
        shapes = [[self._shape(x, heads_dim, len(h), tokens[self.here])] for h in heads]
        return torch.cat([part[0] for part in trade(self._heads, pieces, shapes, self._traded)], heads_dim)

    @staticmethod
    def _shape(x: Tensor, heads_dim: int, heads: int, tokens: int) -> tuple[int, ...]:
        """The shape of x with other numbers of heads and tokens; one of them is dim 1, the other dim 2."""
        shape = list(x.shape)
        shape[heads_dim], shape[3 - heads_dim] = heads, tokens
        return tuple(shape)

    def _rounds(self, q_heads: int, kv_heads: int) -> list[tuple[range, slice]]:
        """(kv heads, their query heads) of each round."""
        n, each = min(self.chunks, kv_heads), q_heads // kv_heads
        ranges = [range(kv_heads * i // n, kv_heads * (i + 1) // n) for i in range(n)]
        return [(kv, slice(kv.start * each, kv.stop * each)) for kv in ranges]

    def _tokens(self, placement: Placement) -> list[int]:
        """Tokens of each rank of the head axis."""
        return [placement.tokens(self.inner.rank * self.ways + i) for i in range(self.ways)]


@lru_cache(maxsize=64)
@concrete
def _inner(placement: Placement, ways: int) -> Placement:
    """The placement that the inner layout sees: the `ways` ranks of the head axis together are one rank of
    it. Cached by value: a placement in bricks has thousands of spans, and a layer asks three times.
    """
    spans = placement.spans_by_rank
    groups = [spans[i : i + ways] for i in range(0, len(spans), ways)]
    return Placement(placement.length, tuple(tuple(s for one in group for s in one) for group in groups))


def _of_round(q: Tensor, k: Tensor, v: Tensor, kv: range, heads: slice) -> tuple[Tensor, Tensor, Tensor]:
    return q[:, :, heads], k[:, :, kv.start : kv.stop], v[:, :, kv.start : kv.stop]


def _sequence(mesh: DeviceMesh, outer: dist.ProcessGroup | None, axis: str) -> dist.ProcessGroup:
    """The ranks of the inner layout's axis and of `axis` together, in the order of the placement."""
    names = list(mesh.mesh_dim_names or ())
    found = next((name for name in names if mesh.get_group(name) is outer), None)
    if found is None or names.index(found) > names.index(axis):
        raise ValueError(
            f"parallel.layout.axis is {axis!r} and parallel.layout.inner attends over "
            f"{found or 'several axes'}: inner needs one axis that comes before it in the mesh, "
            f"{', '.join(names)}; as in parallel=usp, the one can be head and the other ring"
        )
    return joined(mesh, (found, axis))
