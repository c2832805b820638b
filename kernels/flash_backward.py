"""Attention backward in Triton over tile lists: dQ by query tiles, dK and dV by key tiles. No atomics, so
that the same input gives the same bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .flash_forward import (
    LOG2E,
    PRECISION,
    Block,
    Sizes,
    borders,
    capability,
    config,
    constants,
    dense,
    fitted,
    listed,
    load_tile,
    matrix,
    place,
    require,
    scored,
    shapes,
    sigmoid,
    steps,
    store_tile,
    tanh,
)
from .grain import grain
from .lower import Lowered
from .mask import Mask
from .options import AttentionOptions
from .predicate import operands, visible
from .selection import Selection
from .span import Spans
from .tile import Tiles, check_lists


class Rows(NamedTuple):
    """Kernel argument: what the backward knows of each query."""

    dout: Tensor  # [B, Nq, Hq, D], in the dtype of q
    delta: Tensor | None  # [B, Hq, Nq], float32, contiguous
    lse: Tensor | None  # the same, in units of log 2; +inf for a row without keys, whose weights it makes 0


def backward(
    dout: Tensor, delta: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, mask: Mask,
    low: Lowered, at_q: Spans, at_k: Spans, options: AttentionOptions,
    blocks: tuple[Block, Block] | None = None, selection: Selection | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [B, Nq, Hq, D], dk, dv [B, Nk, Hkv, D] over these keys, float32.

    `lse` and `delta` = rowsum(dout * out) - dlse, [B, Hq, Nq], are those of the whole row, so that gradients
    over disjoint keys sum to the whole; None for sigmoid. `dout` is rounded to the dtype of q.
    """
    require(q)
    best = config(q.shape[3], q.dtype, capability(q), grain(mask))
    by_query, by_key = (fitted(b, selection) for b in blocks or (best.dq, best.dkdv))
    forth, back = (
        listed(mask, (at_q, at_k), q, k, b, selection, transpose=transpose)
        for b, transpose in ((by_query, False), (by_key, True))
    )
    rows = prepared(dout, delta, lse, q.dtype)
    dq = launch_dq(rows, q, k, v, low=low, lists=forth, options=options, block=by_query)
    return dq, *launch_dkdv(rows, q, k, v, low=low, lists=back, options=options, block=by_key)


def launch_dq(
    rows: Rows, q: Tensor, k: Tensor, v: Tensor, *, low: Lowered, lists: Tiles, options: AttentionOptions,
    block: Block,
) -> Tensor:  # fmt: skip
    """dq over given lists: the key tiles of each query tile."""
    check_lists(lists, *shapes(q, k, block, transpose=False))
    q, scores = scored(q, options)
    q, k, v = dense(q), dense(k), dense(v)
    dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    sizes = Sizes(q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1])
    strides, unit = steps(q, k, v, rows.dout)
    # the scale keeps its sign here: it carries that of a q which `scored` flipped
    with torch.cuda.device_of(q):
        attention_backward_dq_kernel[(sizes.batch * sizes.heads * lists.rows,)](
            q, k, v, rows, dq, strides, lists, operands(low), sizes, scores, options.scaling(q.shape[3]),
            UNIT=unit, **constants(q, low, options, block),
        )  # fmt: skip
    return dq


def launch_dkdv(
    rows: Rows, q: Tensor, k: Tensor, v: Tensor, *, low: Lowered, lists: Tiles, options: AttentionOptions,
    block: Block,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv over given lists: the query tiles of each key tile."""
    check_lists(lists, *shapes(q, k, block, transpose=True))
    q, scores = scored(q, options)
    q, k, v = dense(q), dense(k), dense(v)
    dk, dv = (torch.empty(k.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    sizes = Sizes(q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1])
    strides, unit = steps(q, k, v, rows.dout)
    with torch.cuda.device_of(q):
        attention_backward_dkdv_kernel[(sizes.batch * sizes.kv_heads * lists.rows,)](
            q, k, v, rows, dk, dv, strides, lists, operands(low), sizes, scores,
            abs(options.scaling(q.shape[3])), UNIT=unit, **constants(q, low, options, block),
        )  # fmt: skip
    return dk, dv


def prepared(dout: Tensor, delta: Tensor | None, lse: Tensor | None, dtype: torch.dtype) -> Rows:
    """What the kernels take, of the same names in `backward`."""
    dout = dense(dout.to(dtype))
    if delta is None or lse is None:
        return Rows(dout, None, None)
    exponent = lse.float().masked_fill(lse.isinf(), float("inf")) * LOG2E.value
    return Rows(dout, delta.float().contiguous(), exponent.contiguous())


def row_delta(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """rowsum(dout * out) - dlse of dout, out [B, N, H, D], any dtypes but float64; float32 [B, H, N].

    lse, dlse [B, H, N]; dlse None for 0. The dlse of a row without keys counts as 0.
    """
    batch, tokens, heads, head_dim = out.shape
    dout, out = dense(dout), dense(out)
    delta = torch.empty(batch, heads, tokens, dtype=torch.float32, device=out.device)
    sizes = Sizes(batch, heads, heads, tokens, tokens)
    strides, unit = steps(dout, out)
    width = max(16, triton.next_power_of_2(head_dim))
    # 32 rows of 128 numbers fill the loads of four warps
    rows = max(16, 4096 // width)
    with torch.cuda.device_of(out):
        attention_delta_kernel[(batch * heads * triton.cdiv(tokens, rows),)](
            dout, out, lse.contiguous(), None if dlse is None else dlse.contiguous(), delta, strides, sizes,
            D=head_dim, WIDTH=width, BM=rows, UNIT=unit, num_warps=4,
        )  # fmt: skip
    return delta


@triton.jit
def attention_delta_kernel(  # type: ignore[no-untyped-def]
    DOUT, OUT, LSE, DLSE, DELTA, strides, sizes,
    D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of one head; heads that lie beside each other run beside each other."""
    program = tl.program_id(0)
    h, program = program % sizes.heads, program // sizes.heads
    tiles = tl.cdiv(sizes.queries, BM)
    b, start = program // tiles, program % tiles * BM
    do = load_tile(matrix(DOUT, strides[0], b, h, UNIT), start, sizes.queries, BM, D, WIDTH, True)
    o = load_tile(matrix(OUT, strides[1], b, h, UNIT), start, sizes.queries, BM, D, WIDTH, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    m = start + tl.arange(0, BM)
    line = (b.to(tl.int64) * sizes.heads + h) * sizes.queries
    if DLSE is not None:
        alive = tl.abs(load_row(LSE + line, m, sizes.queries, 0.0, True).to(tl.float32)) != float("inf")
        dlse = load_row(DLSE + line, m, sizes.queries, 0.0, True).to(tl.float32)
        delta -= tl.where(alive, dlse, 0.0)
    tl.store(DELTA + line + m, delta, mask=m < sizes.queries)


@triton.jit
def load_row(base, at, limit, OTHER: tl.constexpr, CHECK: tl.constexpr):  # type: ignore[no-untyped-def]
    """base[at], and OTHER from `limit` on if CHECK."""
    if CHECK:
        return tl.load(base + at, mask=at < limit, other=OTHER)
    else:
        return tl.load(base + at)


@triton.jit
def weights(s, lse, seen, scores, SIGMOID: tl.constexpr, CAP: tl.constexpr, PARTIAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """From q k^T, the weights of the values and the slope of the cap."""
    slope = 1.0
    if CAP:
        t = tanh(s * scores.scale)
        s, slope = t * scores.cap, 1.0 - t * t
    else:
        s = s * scores.scale
    p = sigmoid(s + scores.bias) if SIGMOID else tl.exp2(s - lse)
    if PARTIAL:
        p = tl.where(seen, p, 0.0)
    return p, slope


@triton.jit
def gradient(p, dp, delta, slope, SIGMOID: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the scores, from the weights and their gradient."""
    if SIGMOID:
        return p * (1.0 - p) * dp * slope
    else:
        return p * (dp - delta) * slope


@triton.jit
def attention_backward_dq_kernel(  # type: ignore[no-untyped-def]
    Q, K, V, rows, DQ, strides, lists, mask, sizes, scores, scale,
    TREE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SIGMOID: tl.constexpr, CAP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: one query tile of one head. strides, in UNITs: batch, tokens, heads of q, k, v, dout."""
    row, tile, b, h = place(lists, sizes.batch, sizes.heads)
    kv = h // (sizes.heads // sizes.kv_heads)
    start = tile * BM
    q = load_tile(matrix(Q, strides[0], b, h, UNIT), start, sizes.queries, BM, D, WIDTH, True)
    do = load_tile(matrix(rows.dout, strides[3], b, h, UNIT), start, sizes.queries, BM, D, WIDTH, True)
    lse, delta = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    if not SIGMOID:
        m = start + tl.arange(0, BM)
        line = (b.to(tl.int64) * sizes.heads + h) * sizes.queries
        delta = load_row(rows.delta + line, m, sizes.queries, 0.0, True)
        lse = load_row(rows.lse + line, m, sizes.queries, float("inf"), True)
    keys, values = matrix(K, strides[1], b, kv, UNIT), matrix(V, strides[2], b, kv, UNIT)
    full, stop, partial, end = borders(lists, row)
    at = (b % mask.rows, kv, start)
    dq = tl.zeros([BM, WIDTH], tl.float32)
    dq = _sweep_keys(
        dq, (q, do, lse, delta), keys, values, (lists.index, full, stop), at, mask, sizes, scores,
        False, TREE, D, WIDTH, BM, BN, SIGMOID, CAP,
    )  # fmt: skip
    dq = _sweep_keys(
        dq, (q, do, lse, delta), keys, values, (lists.index, partial, end), at, mask, sizes, scores,
        True, TREE, D, WIDTH, BM, BN, SIGMOID, CAP,
    )  # fmt: skip
    store_tile(DQ, dq * scale, b, h, sizes.heads, start, sizes.queries, BM, D, WIDTH)


@triton.jit
def _sweep_keys(  # type: ignore[no-untyped-def]
    dq, own, keys, values, listed, at, mask, sizes, scores,
    PARTIAL: tl.constexpr, TREE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SIGMOID: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Add the listed key tiles to dq; no mask code unless PARTIAL."""
    q, do, lse, delta = own
    index, first, last = listed
    column = tl.load(index + first, mask=first < last, other=0)
    for i in range(first, last):
        start = column * BN
        column = tl.load(index + tl.minimum(i + 1, last - 1))
        k = load_tile(keys, start, sizes.keys, BN, D, WIDTH, PARTIAL)
        v = load_tile(values, start, sizes.keys, BN, D, WIDTH, PARTIAL)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        seen = True
        if PARTIAL:
            m, n = at[2] + tl.arange(0, BM)[:, None], start + tl.arange(0, BN)[None, :]
            seen = visible(TREE, mask, at[0], at[1], m, n, sizes.queries, sizes.keys)
        p, slope = weights(s, lse[:, None], seen, scores, SIGMOID, CAP, PARTIAL)
        ds = gradient(p, dp, delta[:, None], slope, SIGMOID)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def attention_backward_dkdv_kernel(  # type: ignore[no-untyped-def]
    Q, K, V, rows, DK, DV, strides, lists, mask, sizes, scores, scale,
    TREE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SIGMOID: tl.constexpr, CAP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: one key tile of one kv head, over all query heads that share it."""
    row, tile, b, kv = place(lists, sizes.batch, sizes.kv_heads)
    start = tile * BN
    k = load_tile(matrix(K, strides[1], b, kv, UNIT), start, sizes.keys, BN, D, WIDTH, True)
    v = load_tile(matrix(V, strides[2], b, kv, UNIT), start, sizes.keys, BN, D, WIDTH, True)
    full, stop, partial, end = borders(lists, row)
    at = (b % mask.rows, kv, start)
    dk, dv = tl.zeros([BN, WIDTH], tl.float32), tl.zeros([BN, WIDTH], tl.float32)
    # all heads' full tiles first: what the predicate needs of the keys is not held in registers meanwhile
    dk, dv = _sweep_queries(
        dk, dv, k, v, Q, rows, strides, b, (lists.index, full, stop), at, mask, sizes, scores,
        False, TREE, D, WIDTH, BM, BN, SIGMOID, CAP, UNIT,
    )  # fmt: skip
    dk, dv = _sweep_queries(
        dk, dv, k, v, Q, rows, strides, b, (lists.index, partial, end), at, mask, sizes, scores,
        True, TREE, D, WIDTH, BM, BN, SIGMOID, CAP, UNIT,
    )  # fmt: skip
    store_tile(DK, dk * scale, b, kv, sizes.kv_heads, start, sizes.keys, BN, D, WIDTH)
    store_tile(DV, dv, b, kv, sizes.kv_heads, start, sizes.keys, BN, D, WIDTH)


@triton.jit
def _sweep_queries(  # type: ignore[no-untyped-def]
    dk, dv, k, v, Q, rows, strides, b, listed, at, mask, sizes, scores,
    PARTIAL: tl.constexpr, TREE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SIGMOID: tl.constexpr, CAP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Add the listed query tiles of each query head to dk, dv. Scores stand transposed: [keys, queries]."""
    index, first, last = listed
    group = sizes.heads // sizes.kv_heads
    for g in range(group):
        h = at[1] * group + g
        queries, douts = matrix(Q, strides[0], b, h, UNIT), matrix(rows.dout, strides[3], b, h, UNIT)
        line = (b.to(tl.int64) * sizes.heads + h) * sizes.queries
        column = tl.load(index + first, mask=first < last, other=0)
        for i in range(first, last):
            start = column * BM
            column = tl.load(index + tl.minimum(i + 1, last - 1))
            q = load_tile(queries, start, sizes.queries, BM, D, WIDTH, PARTIAL)
            do = load_tile(douts, start, sizes.queries, BM, D, WIDTH, PARTIAL)
            m = start + tl.arange(0, BM)
            lse, delta = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
            if not SIGMOID:
                delta = load_row(rows.delta + line, m, sizes.queries, 0.0, PARTIAL)
                lse = load_row(rows.lse + line, m, sizes.queries, float("inf"), PARTIAL)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            seen = True
            if PARTIAL:
                n = at[2] + tl.arange(0, BN)[:, None]
                seen = visible(TREE, mask, at[0], at[1], m[None, :], n, sizes.queries, sizes.keys)
            p, slope = weights(s, lse[None, :], seen, scores, SIGMOID, CAP, PARTIAL)
            # dv before dp: fewer registers are live than with both products of the scores at hand
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = gradient(p, dp, delta[None, :], slope, SIGMOID)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv
