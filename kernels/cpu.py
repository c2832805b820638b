"""Attention on the CPU: a mask cut into a few calls of torch's own flash operator, over blocks of tiles."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cells import kinds
from .lower import Lowered
from .mask import Mask, Unsupported
from .options import AttentionOptions
from .selection import Selection
from .span import Spans
from .steps import Step, selected, steps

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Group(NamedTuple):
    """Batch rows, query heads and kv heads that share their steps."""

    batch: slice
    q_heads: slice
    kv_heads: slice
    steps: Iterable[Step]


class Work(NamedTuple):
    """What the backward operator reads: [B, H, N, D], lse [B, Hq, Nq]. Its delta is rowsum(dout * out)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor


def supports(q: Tensor, options: AttentionOptions) -> bool:
    """Softmax without softcap on CPU tensors; the rest is the reference's."""
    plain = options.normalizer == "softmax" and not options.softcap
    return plain and q.device.type == "cpu" and q.dtype in DTYPES


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    low: Lowered,
    at_q: Spans,
    at_k: Spans,
    options: AttentionOptions,
    selection: Selection | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, Nq, Hq, D], k, v [B, Nk, Hkv, D] -> out [B, Nq, Hq, D], lse [B, Hq, Nq] in the partial dtype.

    Half precision is computed in float32: the operator would round `out`, a partial result, to its dtype.
    """
    refuse(q, options)
    sign, scale = _positive(options.scaling(q.shape[-1]))
    out = torch.zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32)).transpose(1, 2)
    q, k, v = _heads_first(q if sign == 1 else q * sign, k, v)
    lse = q.new_full(q.shape[:3], float("-inf"))
    for group in _groups(mask, low, at_q, at_k, q.shape[1], selection):
        written = 0
        for step in group.steps:
            at_rows = group.batch, group.q_heads, step.rows
            own_k, own_v = (_take(x[group.batch, group.kv_heads], step.keys) for x in (k, v))
            part = _operate(q[at_rows], own_k, own_v, step, scale)
            if step.rows.stop > written:
                out[at_rows], lse[at_rows] = part
            else:
                _add(out[at_rows], lse[at_rows], *part)
            written = step.rows.stop
    return out.transpose(1, 2), lse


def backward(
    dout: Tensor, delta: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, mask: Mask,
    low: Lowered, at_q: Spans, at_k: Spans, options: AttentionOptions, selection: Selection | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv over these keys in the partial dtype, from the whole row's lse and delta [B, Hq, Nq]."""
    refuse(q, options)
    assert lse is not None and delta is not None
    sign, scale = _positive(options.scaling(q.shape[-1]))
    q, k, v, dout = _heads_first(q if sign == 1 else q * sign, k, v, dout)
    dead = lse.isinf()
    delta = delta.to(q.dtype).masked_fill(dead, 0.0)
    # exp(score - the largest number) is 0, and with it every gradient of the row
    lse = lse.to(q.dtype).masked_fill(dead, torch.finfo(q.dtype).max)
    out, lost = _stand_in(dout, delta)
    found = dout.masked_fill(lost[..., None], 0.0) if lost.any() else dout
    groups = partial(_groups, mask, low, at_q, at_k, q.shape[1], selection)
    grads = _sweep(Work(q, k, v, found, out, lse), groups(), scale)
    if lost.any():
        rest = _widened(Work(q, k, v, dout, out, lse), delta, lost)
        extra = _sweep(rest, groups(), scale)
        grads = [a + b[..., :-1] for a, b in zip(grads, extra, strict=True)]
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq if sign == 1 else dq * sign, dk, dv


def refuse(q: Tensor, options: AttentionOptions) -> None:
    """Unsupported, saying what does, where `supports` is false."""
    if not supports(q, options):
        raise Unsupported(
            f"backend='cpu' does softmax without softcap on CPU tensors, not {options.normalizer} with "
            f"softcap {options.softcap} on {q.device.type}, {q.dtype}; backend='reference' does"
        )


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[B, N, H, D] -> [B, H, N, D] in the partial dtype; contiguous, which is worth the copy: what heads lie
    between slows the operator down more, and gathering keys most.
    """
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [x.to(dtype).transpose(1, 2).contiguous() for x in tensors]


def _groups(
    mask: Mask, low: Lowered, at_q: Spans, at_k: Spans, q_heads: int, selection: Selection | None
) -> Iterator[Group]:
    rows, kv_heads = low.tables_q.shape[1], len(low.heads)
    like = kinds(mask, kv_heads)[1]
    heads = len(like)
    if selection is not None:
        rows, heads = max(rows, selection.chosen.shape[0]), max(heads, selection.chosen.shape[1])
    shares = q_heads // heads, kv_heads // heads
    for row in range(rows):
        batch = slice(row, row + 1) if rows > 1 else slice(None)
        for head in range(heads):
            own, own_kv = (slice(head * n, (head + 1) * n) for n in shares)
            if selection is None:
                # of heads that see the same, the steps of the first are kept
                first = like.index(like[head])
                found = steps(mask, at_q, at_k, kv_heads=kv_heads, group=(row, first))
            else:
                found = selected(selection, mask, at_q, at_k, kv_heads=kv_heads, group=(row, head))
            yield Group(batch, own, own_kv, found)


def _positive(scale: float) -> tuple[int, float]:
    """(sign of q, scale): the operator hides keys before it scales, so that minus infinity times a scale that
    is not positive would be seen.
    """
    return (1, scale) if scale > 0 else (-1, -scale) if scale < 0 else (0, 1.0)


def _operate(q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float) -> tuple[Tensor, Tensor]:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = operator(q, k, v, 0.0, step.causal, attn_mask=_bias(step, q.dtype), scale=scale)
    if step.dead is not None:
        # the operator says lse = 0 for a row without keys
        lse = lse.masked_fill(step.dead, float("-inf"))
    return out, lse


def _sweep(work: Work, groups: Iterable[Group], scale: float) -> list[Tensor]:
    """dq, dk, dv [B, H, N, D], summed over the steps."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (work.q, work.k, work.v)]
    for group in groups:
        dq, dk, dv = (
            x[group.batch, heads]
            for x, heads in zip(grads, (group.q_heads, group.kv_heads, group.kv_heads), strict=True)
        )
        for step in group.steps:
            at_rows = group.batch, group.q_heads, step.rows
            k, v = (_take(x[group.batch, group.kv_heads], step.keys) for x in (work.k, work.v))
            q, dout, out, lse = (x[at_rows] for x in (work.q, work.dout, work.out, work.lse))
            bias = _bias(step, q.dtype)
            parts = operator(dout, q, k, v, out, lse, 0.0, step.causal, attn_mask=bias, scale=scale)
            dq[:, :, step.rows] += parts[0]
            _put(dk, step.keys, parts[1])
            _put(dv, step.keys, parts[2])
    return grads


def _stand_in(dout: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lost): an `out` with rowsum(dout * out) == delta to the last digit, and the rows that have none.

    One product, with the row's greatest |dout|, makes the whole sum: nothing cancels.
    """
    at = dout.abs().argmax(-1, keepdim=True)
    ratio = delta / dout.gather(-1, at).squeeze(-1)
    lost = (delta != 0) & ~ratio.isfinite()
    ratio = ratio.masked_fill(lost | (delta == 0), 0.0)
    return torch.zeros_like(dout).scatter_(-1, at, ratio[..., None]), lost


def _widened(work: Work, delta: Tensor, lost: Tensor) -> Work:
    """The work of the `lost` rows alone, one column wider: there v is 0, dout 1 and out delta."""
    keep = lost[..., None]
    q, k, v = (F.pad(x, (0, 1)) for x in (work.q, work.k, work.v))
    dout = torch.cat((work.dout.masked_fill(~keep, 0.0), keep.to(delta.dtype)), -1)
    out = torch.cat((torch.zeros_like(work.dout), delta.masked_fill(~lost, 0.0)[..., None]), -1)
    return Work(q, k, v, dout, out, work.lse)


def _add(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merge a second partial result of the same rows into (out, lse)."""
    whole = torch.logaddexp(lse, other_lse)
    top = whole.clamp_min(torch.finfo(whole.dtype).min)
    out.mul_((lse - top).exp_()[..., None]).add_(other * (other_lse - top).exp_()[..., None])
    lse.copy_(whole)


def _bias(step: Step, dtype: torch.dtype) -> Tensor | None:
    if step.seen is None:
        return None
    return torch.where(step.seen, torch.zeros((), dtype=dtype), float("-inf"))


def _take(x: Tensor, keys: Spans) -> Tensor:
    parts = [x[:, :, s.start : s.start + s.length] for s in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _put(target: Tensor, keys: Spans, grad: Tensor) -> None:
    for s, part in zip(keys, grad.split([s.length for s in keys], 2), strict=True):
        target[:, :, s.start : s.start + s.length] += part
