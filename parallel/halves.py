"""The two halves of a layout, forward and backward without autograd, and the autograd functions that join
them: alone, and with joint tokens.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.attention import check, row_delta
from ..kernels.mask import Mask
from ..kernels.options import AttentionOptions
from .joint import Joining, Joint, Team, check_joint, weighted
from .placement import Placement
from .refuse import refuse_misfits

DEFAULT = AttentionOptions()
Saved = tuple[Tensor | None, ...]
Triple = tuple[Tensor, Tensor, Tensor]


class Halves(Protocol):
    """What a layout computes. Layouts compose by calling each other's halves: partial results stay float32 in
    between.

    Autograd over the steps of a layout would keep every rank's keys alive; `saved` is all that a half keeps.
    """

    def refuse(self, mask: Mask, placement: Placement, kv_heads: int) -> None:
        """Unsupported for what the layout cannot serve, from values that all ranks share, and before anything
        is sent. Who calls the halves calls it before.
        """
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, options: AttentionOptions
    ) -> tuple[Tensor, Tensor | None, Saved]:
        """(out [B, N, Hq, D], lse [B, Hq, N] or None, what backward needs), lse in the partial dtype, and
        out too unless it had to travel.
        """
        ...

    def partial(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, options: AttentionOptions
    ) -> tuple[Tensor, Tensor | None, Saved]:
        """`forward` for rows into which more will be merged: out in the partial dtype always."""
        ...

    def again(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, mask: Mask, placement: Placement
    ) -> Saved:
        """What `forward` kept of these, from the lse that it gave: for who did not keep it meanwhile."""
        ...

    def backward(
        self,
        dout: Tensor,
        delta: Tensor | None,
        saved: Saved,
        mask: Mask,
        placement: Placement,
        options: AttentionOptions,
    ) -> Triple:
        """dq, dk, dv of the tokens held here, in the partial dtype; delta [B, Hq, N] = rowsum(dout * out)
        - dlse.
        """
        ...


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, halves: Halves, mask: Mask, placement: Placement,
        options: AttentionOptions,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        out, lse, saved = halves.forward(q, k, v, mask, placement, options)
        out = out.to(q.dtype)
        ctx.save_for_backward(out, lse, *saved)
        ctx.rest = halves, mask, placement, options, k.dtype
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *saved = ctx.saved_tensors
        halves, mask, placement, options, dtype = ctx.rest
        delta = row_delta(dout, out, lse, dlse)
        dq, dk, dv = halves.backward(dout, delta, tuple(saved), mask, placement, options)
        # the one cast: everything that was summed or travelled was float32
        return dq.to(out.dtype), dk.to(dtype), dv.to(dtype), None, None, None, None


class _Beside(torch.autograd.Function):
    """`_Joined` with joint tokens before the sequence."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, jq: Tensor, jk: Tensor, jv: Tensor, halves: Halves,
        mask: Mask, placement: Placement, joining: Joining,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        out, own, saved = halves.partial(q, k, v, mask, placement, joining.options)
        out, lse = joining.forward((q, k, v), Joint(jq, jk, jv), (out, own))
        out = out.to(q.dtype)
        ctx.save_for_backward(out, lse, own, q, k, v, jq, jk, jv, *saved)
        ctx.rest = halves, mask, placement, joining
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, own, q, k, v, *rest = ctx.saved_tensors
        halves, mask, placement, joining = ctx.rest
        joint, saved, n = Joint(*rest[:3]), tuple(rest[3:]), rest[0].shape[1]
        dout, dlse = joining.upstream(dout, dlse, n)
        delta = row_delta(dout, out, lse, dlse)
        local, shares = joining.backward(dout, delta, (q, k, v), joint, lse)
        mine = dout[:, n:], None if delta is None else delta[:, :, n:]
        if own is not None:
            mine = weighted(mine, own, lse[:, :, n:])
        found = halves.backward(mine[0].to(q.dtype), mine[1], saved, mask, placement, joining.options)
        grads = (*(a + b for a, b in zip(found, local, strict=True)), *shares)
        return *(g.to(q.dtype) for g in grads), None, None, None, None


class Joined:
    """Gives a layout with halves its differentiable `attention`."""

    rank: int

    def refuse(self, mask: Mask, placement: Placement, kv_heads: int) -> None:
        """See `Halves.refuse`; for a layout that serves everything."""

    def partial(
        self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement,
        options: AttentionOptions,
    ) -> tuple[Tensor, Tensor | None, Saved]:  # fmt: skip
        """See `Halves.partial`; for a layout whose `forward` never rounds."""
        found: tuple[Tensor, Tensor | None, Saved] = self.forward(q, k, v, mask, placement, options)
        return found

    def again(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, mask: Mask, placement: Placement
    ) -> Saved:
        """See `Halves.again`; for a layout that keeps its inputs and the lse."""
        return q, k, v, lse

    def attention(
        self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, *,
        options: AttentionOptions = DEFAULT, joint: Joint | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See `Layout.attention`."""
        refuse_misfits(self.size, q, k, mask, placement)
        self.refuse(mask, placement, k.shape[2])
        at = placement.spans_by_rank[self.rank]
        check(q, k, v, mask, at, at)
        result: tuple[Tensor, Tensor | None]
        if joint is None:
            result = _Joined.apply(q, k, v, self, mask, placement, options)
        else:
            check_joint(joint, q, k)
            joining = Joining(Team(self.group, self.rank, self.size, self.traffic), at, options)
            result = _Beside.apply(q, k, v, *joint, self, mask, placement, joining)
        return result
