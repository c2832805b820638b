"""Attention by definition: any mask, any dtype up to float64. Every kernel must match this."""

import torch
from torch import Tensor

from .lower import Lowered, visible
from .options import AttentionOptions
from .selection import Selection

Pair = tuple[Tensor, Tensor | None]
Triple = tuple[Tensor, Tensor, Tensor]


def forward(
    q: Tensor, k: Tensor, v: Tensor, low: Lowered, options: AttentionOptions,
    selection: Selection | None = None,
) -> Pair:  # fmt: skip
    """q [B, Nq, Hq, D], k, v [B, Nk, Hkv, D] -> out [B, Nq, Hq, D], lse [B, Hq, Nq] (None for sigmoid),
    partial dtype.
    """
    with _exact(q):
        qh, kh, vh = _heads_first(q, k, v)
        s = _scores(qh, kh, low, options, selection)
        if options.normalizer == "sigmoid":
            return (s.sigmoid() @ vh).transpose(1, 2), None
        lse = s.logsumexp(-1)
        p = (s - lse.clamp_min(torch.finfo(s.dtype).min)[..., None]).exp()
        return (p @ vh).transpose(1, 2), lse


def backward(
    dout: Tensor, delta: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, low: Lowered,
    options: AttentionOptions, selection: Selection | None = None,
) -> Triple:  # fmt: skip
    """Gradients over these keys; `lse` and `delta` [B, Hq, Nq] are those of the whole row, so parts sum to
    the whole.
    """
    with _exact(q):
        qh, kh, vh = _heads_first(q, k, v)
        g = dout.to(qh.dtype).transpose(1, 2)
        s = _scores(qh, kh, low, options, selection)
        dp = g @ vh.mT
        if options.normalizer == "sigmoid":
            p = s.sigmoid()
            ds = p * (1 - p) * dp
        else:
            assert lse is not None and delta is not None
            p = (s - lse.clamp_min(torch.finfo(s.dtype).min)[..., None]).exp()
            ds = p * (dp - delta[..., None])
        if options.softcap:
            # the derivative of softcap * tanh(x / softcap), from its value; masked scores carry nothing
            capped = s.masked_fill(s.isinf(), 0.0) - options.bias
            ds = ds * (1 - (capped / options.softcap) ** 2)
        ds = ds * options.scaling(q.shape[-1])
        groups = (k.shape[2], -1)
        dk = (ds.mT @ qh).unflatten(1, groups).sum(2)
        dv = (p.mT @ g).unflatten(1, groups).sum(2)
        return (ds @ kh).transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _exact(q: Tensor) -> torch.autocast:
    """The caller's autocast would make half-precision partial results of the matmuls here."""
    return torch.autocast(q.device.type, enabled=False)


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> Triple:
    dtype = torch.promote_types(q.dtype, torch.float32)
    times = q.shape[2] // k.shape[2]
    qh, kh, vh = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    return qh, kh.repeat_interleave(times, 1), vh.repeat_interleave(times, 1)


def _scores(
    q: Tensor, k: Tensor, low: Lowered, options: AttentionOptions, selection: Selection | None
) -> Tensor:
    s = q @ k.mT * options.scaling(q.shape[-1])
    if options.softcap:
        s = options.softcap * (s / options.softcap).tanh()
    if options.normalizer == "sigmoid":
        s = s + options.bias
    seen = visible(low)
    if selection is not None:
        seen = seen & selection.in_blocks((1, 1), q.shape[2], k.shape[2])
    seen = seen.expand(-1, len(low.heads), -1, -1).repeat_interleave(q.shape[1] // len(low.heads), 1)
    return s.masked_fill(~seen, float("-inf"))
