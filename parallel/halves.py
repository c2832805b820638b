"""The two halves of a layout, forward and backward without autograd, and the one autograd function that
joins them.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.attention import check, partial_dtype, row_delta
from ..kernels.mask import Mask
from ..kernels.options import AttentionOptions
from .placement import Placement

DEFAULT = AttentionOptions()
Saved = tuple[Tensor | None, ...]
Triple = tuple[Tensor, Tensor, Tensor]


class Halves(Protocol):
    """What a layout computes. Layouts compose by calling each other's halves: partial results stay float32 in
    between.

    Autograd over the steps of a layout would keep every rank's keys alive; `saved` is all that a half keeps.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, options: AttentionOptions
    ) -> tuple[Tensor, Tensor | None, Saved]:
        """(out [B, N, Hq, D], lse [B, Hq, N] or None, what backward needs), the first two in the partial
        dtype.
        """
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
    def backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *saved = ctx.saved_tensors
        halves, mask, placement, options, dtype = ctx.rest
        delta = row_delta(dout, out.to(partial_dtype(out)), lse, dlse)
        dq, dk, dv = halves.backward(dout, delta, tuple(saved), mask, placement, options)
        # the one cast: everything that was summed or travelled was float32
        return dq.to(out.dtype), dk.to(dtype), dv.to(dtype), None, None, None, None


class Joined:
    """Gives a layout with halves its differentiable `attention`."""

    rank: int

    def attention(
        self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, *,
        options: AttentionOptions = DEFAULT,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See `Layout.attention`."""
        at = placement.spans_by_rank[self.rank]
        check(q, k, v, at, at)
        result: tuple[Tensor, Tensor | None] = _Joined.apply(q, k, v, self, mask, placement, options)
        return result
