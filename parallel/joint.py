"""Joint tokens: a replicated block that every query of the sequence sees and that sees everything, once."""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.attention import backward, check, combine, forward, partial_dtype
from ..kernels.mask import Full
from ..kernels.options import AttentionOptions
from ..kernels.span import Span, Spans
from .comm import Traffic, trade

Rows = tuple[Tensor, Tensor | None]  # out [B, T, Hq, D], lse [B, Hq, T] or None for sigmoid
Triple = tuple[Tensor, Tensor, Tensor]
EVERYTHING = Full()


class Joint(NamedTuple):
    """Tokens beside the sequence (the text of an MM-DiT, registers): q [B, J, Hq, D], k, v [B, J, Hkv, D],
    the same on every rank of the layout.
    """

    q: Tensor
    k: Tensor
    v: Tensor


class Team(NamedTuple):
    """The ranks that hold one sequence, and this one's place among them; group is None for one alone."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    traffic: Traffic


class Joining(NamedTuple):
    """What one attention with joint tokens knows besides its tensors.

    Local queries see the joint keys where they are. Joint queries see the keys that each rank holds; a part
    of the joint rows is merged by each rank, which also adds what these rows see of the joint tokens
    themselves: that is how nothing is counted twice, and why all ranks get the same bits.
    """

    team: Team
    at: Spans  # of the tokens held here
    options: AttentionOptions

    def forward(self, local: Triple, joint: Joint, found: Rows) -> Rows:
        """The joint rows and, after them, those of the tokens held here. found: what the layout gives for
        these.
        """
        q, k, v = local
        rows = combine(found, self._see(q, joint.k, joint.v, self.at, span(joint)))
        seen = self._see(joint.q, k, v, span(joint), self.at)
        out, lse = self._exchanged(seen, combine, lambda part: self._among(joint, part))
        whole = None if lse is None or rows[1] is None else torch.cat((lse, rows[1]), 2)
        return torch.cat((out, rows[0]), 1), whole

    def upstream(self, dout: Tensor, dlse: Tensor | None, tokens: int) -> Rows:
        """The gradients of all rows, those of the `tokens` joint ones summed over the ranks, partial
        dtype.
        """
        dtype = partial_dtype(dout)
        share = dout[:, :tokens].to(dtype), None if dlse is None else dlse[:, :, :tokens].to(dtype)
        out, lse = self._exchanged(share, added)
        whole = None if lse is None or dlse is None else torch.cat((lse, dlse[:, :, tokens:]), 2)
        return torch.cat((out, dout[:, tokens:].to(dtype)), 1), whole

    def backward(
        self, dout: Tensor, delta: Tensor | None, local: Triple, joint: Joint, lse: Tensor | None
    ) -> tuple[Triple, Triple]:
        """What the joint tokens add to dq, dk, dv of the tokens held here, and this rank's share of the
        gradients of the joint tokens; partial dtype. dout, delta, lse: of all rows.
        """
        (q, k, v), n, to = local, joint.q.shape[1], span(joint)
        upper, lower, mine = slice(0, n), slice(n, None), self._share(n)

        def over(rows: slice, qkv: Triple, at_q: Spans, at_k: Spans) -> Triple:
            d, s = (None if x is None else x[:, :, rows] for x in (delta, lse))
            g = dout[:, rows].to(q.dtype)
            return backward(g, d, *qkv, s, EVERYTHING, at_q, at_k, options=self.options)

        of_q = over(lower, (q, joint.k, joint.v), self.at, to)
        of_j = over(upper, (joint.q, k, v), to, self.at)
        among = over(mine, (joint.q[:, mine], joint.k, joint.v), self._at(mine), to)
        dq = of_j[0]
        dq[:, mine] += among[0]
        return (of_q[0], of_j[1], of_j[2]), (dq, of_q[1] + among[1], of_q[2] + among[2])

    def _see(self, q: Tensor, k: Tensor, v: Tensor, at_q: Spans, at_k: Spans) -> Rows:
        return forward(q, k, v, EVERYTHING, at_q, at_k, options=self.options)

    def _among(self, joint: Joint, part: Rows) -> Rows:
        """This rank's part of the joint rows with the joint keys added."""
        mine = self._share(joint.q.shape[1])
        return combine(part, self._see(joint.q[:, mine], joint.k, joint.v, self._at(mine), span(joint)))

    def _share(self, tokens: int, rank: int | None = None) -> slice:
        """The joint rows that a rank (None: this one) merges."""
        rank = self.team.rank if rank is None else rank
        return slice(tokens * rank // self.team.size, tokens * (rank + 1) // self.team.size)

    @staticmethod
    def _at(rows: slice) -> Spans:
        return (Span(rows.start, rows.stop - rows.start),)

    def _exchanged(
        self, share: Rows, merged: Callable[[Rows, Rows], Rows], finish: Callable[[Rows], Rows] = lambda x: x
    ) -> Rows:
        """The joint rows made of every rank's share of them, in rank order, the same bits on all ranks.

        Each rank merges and finishes its part of the rows: two all-to-alls, of O(J) bytes a rank, whatever
        their number.
        """
        team, tokens = self.team, share[0].shape[1]
        if team.group is None:
            return finish(share)
        cuts = [self._share(tokens, rank) for rank in range(team.size)]
        pieces = [[x[:, cut].contiguous() for x in _packed(share)] for cut in cuts]
        shapes = [[tuple(x.shape) for x in piece] for piece in pieces]
        mine = [shapes[team.rank]] * team.size
        shares = [_unpacked(part) for part in trade(team.group, pieces, mine, team.traffic)]
        done = [x.contiguous() for x in _packed(finish(reduce(merged, shares)))]
        parts = trade(team.group, [done] * team.size, shapes, team.traffic)
        return _unpacked([torch.cat(x, 1) for x in zip(*parts, strict=True)])


def span(joint: Joint) -> Spans:
    """Where joint tokens sit among themselves; under `Full` no position matters."""
    return (Span(0, joint.q.shape[1]),)


def added(a: Rows, b: Rows) -> Rows:
    """The sums of both."""
    return a[0] + b[0], None if a[1] is None or b[1] is None else a[1] + b[1]


def weighted(rows: Rows, own: Tensor, whole: Tensor) -> Rows:
    """(dout, delta) of whole rows as a part with the lse `own` needs them, that knows of no other keys.

    With p = exp(s - whole) = exp(s - own) exp(own - whole), both gradients of the part's rows carry the last
    factor: 0 where it saw no key.
    """
    dead = own.isinf()
    part = (own.masked_fill(dead, 0.0) - whole.masked_fill(dead, 0.0)).exp().masked_fill(dead, 0.0)
    delta = None if rows[1] is None else rows[1] * part
    return rows[0] * part.transpose(1, 2)[..., None], delta


def check_joint(joint: Joint, q: Tensor, k: Tensor) -> None:
    """Refuse joint tokens that do not fit each other, or the sequence's local q and k."""
    check(*joint, Full(), span(joint), span(joint))
    for name, own, other in (("q", joint.q, q), ("k", joint.k, k)):
        if own.shape[0] != other.shape[0] or own.shape[2:] != other.shape[2:] or own.dtype != other.dtype:
            raise ValueError(
                f"joint.{name} is {tuple(own.shape)} {own.dtype}, but {name} is {tuple(other.shape)} "
                f"{other.dtype}: only the number of tokens may differ"
            )


def _packed(rows: Rows) -> list[Tensor]:
    """The parts with the tokens in dim 1."""
    return [rows[0]] if rows[1] is None else [rows[0], rows[1].transpose(1, 2)]


def _unpacked(parts: list[Tensor]) -> Rows:
    return parts[0], parts[1].transpose(1, 2) if len(parts) > 1 else None
