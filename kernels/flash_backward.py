"""Attention backward in Triton over tile lists: dQ by query tiles, dK and dV by key tiles; no atomics, so repeatable."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .flash_forward import (
    LOG2E,
    Block,
    Sizes,
    borders,
    capability,
    config,
    constants,
    load_tile,
    place,
    require,
    rows,
    scored,
    sigmoid,
    store_tile,
    tanh,
)
from .mask import Lowered, Mask
from .options import AttentionOptions
from .predicate import operands, visible
from .span import Spans
from .tile import Tiles, tiles


def backward(
    dout: Tensor, delta: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, mask: Mask, low: Lowered,
    at_q: Spans, at_k: Spans, options: AttentionOptions, blocks: tuple[Block, Block] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [B, Nq, Hq, D], dk, dv [B, Nk, Hkv, D], float32, over these keys.

    `lse` and `delta` = rowsum(dout * out) - dlse, [B, Hq, Nq], are those of the whole row, so that the gradients over
    disjoint keys sum to the whole; None for sigmoid. `dout` is rounded to q's dtype.
    """
    require(q)
    best = config(q.shape[3], q.dtype, capability(q))
    by_query, by_key = blocks or (best.dq, best.dkdv)
    one, other = (
        tiles(mask, at_q, at_k, k.shape[2], size=(b.queries, b.keys), transpose=transpose, device=q.device)
        for b, transpose in ((by_query, False), (by_key, True))
    )
    row_data = (dout, delta, lse)
    dq = launch_dq(row_data, q, k, v, low=low, lists=one, options=options, block=by_query)
    return dq, *launch_dkdv(row_data, q, k, v, low=low, lists=other, options=options, block=by_key)


RowData = tuple[Tensor, Tensor | None, Tensor | None]  # dout, delta, lse


def launch_dq(
    row_data: RowData, q: Tensor, k: Tensor, v: Tensor, *, low: Lowered, lists: Tiles, options: AttentionOptions, block: Block
) -> Tensor:
    """dq over given lists of key tiles for each query tile."""
    flipped, scores = scored(q, options)
    q, k, v, dout = rows(flipped), rows(k), rows(v), rows(row_data[0].to(q.dtype))
    dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    sizes = Sizes(q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1])
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    attention_backward_dq_kernel[(sizes.batch * sizes.heads * lists.rows,)](
        q, k, v, dout, _row(row_data[1]), _row(row_data[2]), dq, strides, lists, operands(low), sizes, scores,
        options.scaling(q.shape[3]), **constants(q, low, options, block),
    )  # fmt: skip
    return dq


def launch_dkdv(
    row_data: RowData, q: Tensor, k: Tensor, v: Tensor, *, low: Lowered, lists: Tiles, options: AttentionOptions, block: Block
) -> tuple[Tensor, Tensor]:
    """dk and dv over given, transposed lists: of query tiles for each key tile."""
    flipped, scores = scored(q, options)
    q, k, v, dout = rows(flipped), rows(k), rows(v), rows(row_data[0].to(q.dtype))
    dk, dv = (torch.empty(k.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    sizes = Sizes(q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1])
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    attention_backward_dkdv_kernel[(sizes.batch * sizes.kv_heads * lists.rows,)](
        q, k, v, dout, _row(row_data[1]), _row(row_data[2]), dk, dv, strides, lists, operands(low), sizes, scores,
        abs(options.scaling(q.shape[3])), **constants(q, low, options, block),
    )  # fmt: skip
    return dk, dv


def _row(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


@triton.jit
def load_row(base, at, limit, OTHER: tl.constexpr, CHECK: tl.constexpr):  # type: ignore[no-untyped-def]
    """base[at], and OTHER from `limit` on if CHECK."""
    if CHECK:
        return tl.load(base + at, mask=at < limit, other=OTHER)
    else:
        return tl.load(base + at)


@triton.jit
def exponent(lse):  # type: ignore[no-untyped-def]
    """lse in units of log 2; a row without keys (either infinity) becomes +inf, which makes its probabilities 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E


@triton.jit
def probability(s, lse, seen, scores, SIGMOID: tl.constexpr, CAP: tl.constexpr, PARTIAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """From q k^T: the weight of each key, and the slope of the cap."""
    slope = 1.0
    if CAP:
        t = tanh(s * scores.scale)
        s, slope = t * scores.cap, 1.0 - t * t
    else:
        s = s * scores.scale
    if SIGMOID:
        p = sigmoid(s + scores.bias)
    else:
        p = tl.exp2(s - lse)
    if PARTIAL:
        p = tl.where(seen, p, 0.0)
    return p, slope


@triton.jit
def gradient(p, dp, delta, slope, SIGMOID: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the scaled scores, from the gradient of the weights."""
    if SIGMOID:
        return p * (1.0 - p) * dp * slope
    else:
        return p * (dp - delta) * slope


@triton.jit
def attention_backward_dq_kernel(  # type: ignore[no-untyped-def]
    Q, K, V, DO, DELTA, LSE, DQ, strides, lists, mask, sizes, scores, scale,
    TREE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SIGMOID: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, tile, b, h = place(lists, sizes.batch, sizes.heads)
    kv = h // (sizes.heads // sizes.kv_heads)
    b64, h64, kv64 = b.to(tl.int64), h.to(tl.int64), kv.to(tl.int64)
    start = tile * BM
    q = load_tile(Q + b64 * strides[0] + h64 * strides[2], start, strides[1], sizes.queries, BM, D, WIDTH, True)
    do = load_tile(DO + b64 * strides[9] + h64 * strides[11], start, strides[10], sizes.queries, BM, D, WIDTH, True)
    keys = K + b64 * strides[3] + kv64 * strides[5]
    values = V + b64 * strides[6] + kv64 * strides[8]
    lse, delta = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    if not SIGMOID:
        m = start + tl.arange(0, BM)
        line = (b64 * sizes.heads + h) * sizes.queries
        lse = exponent(load_row(LSE + line, m, sizes.queries, float("inf"), True))
        delta = load_row(DELTA + line, m, sizes.queries, 0.0, True)
    first, middle, last = borders(lists, row, sizes.keys // BN)
    at = (b % mask.rows, kv, start)
    dq = tl.zeros([BM, WIDTH], tl.float32)
    dq = _sweep_keys(
        dq, q, do, lse, delta, keys, values, strides[4], strides[7], lists.index, first, middle, at, mask, sizes, scores,
        False, TREE, D, WIDTH, BM, BN, SIGMOID, CAP, PRECISION,
    )  # fmt: skip
    dq = _sweep_keys(
        dq, q, do, lse, delta, keys, values, strides[4], strides[7], lists.index, middle, last, at, mask, sizes, scores,
        True, TREE, D, WIDTH, BM, BN, SIGMOID, CAP, PRECISION,
    )  # fmt: skip
    out = DQ + (b64 * sizes.queries * sizes.heads + h) * D
    store_tile(out, start, sizes.heads * D, sizes.queries, dq * scale, BM, D, WIDTH)


@triton.jit
def _sweep_keys(  # type: ignore[no-untyped-def]
    dq, q, do, lse, delta, K, V, stride_k, stride_v, index, first, last, at, mask, sizes, scores,
    PARTIAL: tl.constexpr, TREE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SIGMOID: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the key tiles index[first:last] to dq; no mask code unless PARTIAL."""
    column = tl.load(index + first, mask=first < last, other=0)
    for i in range(first, last):
        start = column * BN
        column = tl.load(index + tl.minimum(i + 1, last - 1))
        k = load_tile(K, start, stride_k, sizes.keys, BN, D, WIDTH, PARTIAL)
        v = load_tile(V, start, stride_v, sizes.keys, BN, D, WIDTH, PARTIAL)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        seen = True
        if PARTIAL:
            m, n = at[2] + tl.arange(0, BM)[:, None], start + tl.arange(0, BN)[None, :]
            seen = visible(TREE, mask, at[0], at[1], m, n, sizes.queries, sizes.keys)
        p, slope = probability(s, lse[:, None], seen, scores, SIGMOID, CAP, PARTIAL)
        ds = gradient(p, dp, delta[:, None], slope, SIGMOID)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def attention_backward_dkdv_kernel(  # type: ignore[no-untyped-def]
    Q, K, V, DO, DELTA, LSE, DK, DV, strides, lists, mask, sizes, scores, scale,
    TREE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SIGMOID: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, tile, b, kv = place(lists, sizes.batch, sizes.kv_heads)
    b64, kv64 = b.to(tl.int64), kv.to(tl.int64)
    start = tile * BN
    k = load_tile(K + b64 * strides[3] + kv64 * strides[5], start, strides[4], sizes.keys, BN, D, WIDTH, True)
    v = load_tile(V + b64 * strides[6] + kv64 * strides[8], start, strides[7], sizes.keys, BN, D, WIDTH, True)
    first, middle, last = borders(lists, row, sizes.queries // BM)
    at = (b % mask.rows, kv, start)
    group = sizes.heads // sizes.kv_heads
    sums = (tl.zeros([BN, WIDTH], tl.float32), tl.zeros([BN, WIDTH], tl.float32))
    for g in range(group):
        h64 = kv64 * group + g
        line = (b64 * sizes.heads + h64) * sizes.queries
        queries, douts = Q + b64 * strides[0] + h64 * strides[2], DO + b64 * strides[9] + h64 * strides[11]
        sums = _sweep_queries(
            sums, k, v, queries, douts, LSE, DELTA, line, strides[1], strides[10], lists.index, first, middle, at, mask,
            sizes, scores, False, TREE, D, WIDTH, BM, BN, SIGMOID, CAP, PRECISION,
        )  # fmt: skip
        sums = _sweep_queries(
            sums, k, v, queries, douts, LSE, DELTA, line, strides[1], strides[10], lists.index, middle, last, at, mask,
            sizes, scores, True, TREE, D, WIDTH, BM, BN, SIGMOID, CAP, PRECISION,
        )  # fmt: skip
    dk, dv = sums
    out = (b64 * sizes.keys * sizes.kv_heads + kv) * D
    store_tile(DK + out, start, sizes.kv_heads * D, sizes.keys, dk * scale, BN, D, WIDTH)
    store_tile(DV + out, start, sizes.kv_heads * D, sizes.keys, dv, BN, D, WIDTH)


@triton.jit
def _sweep_queries(  # type: ignore[no-untyped-def]
    sums, k, v, Q, DO, LSE, DELTA, line, stride_q, stride_do, index, first, last, at, mask, sizes, scores,
    PARTIAL: tl.constexpr, TREE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SIGMOID: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the query tiles index[first:last] of one head to (dk, dv). Scores are computed transposed, [keys, queries]."""
    dk, dv = sums
    column = tl.load(index + first, mask=first < last, other=0)
    for i in range(first, last):
        start = column * BM
        column = tl.load(index + tl.minimum(i + 1, last - 1))
        q = load_tile(Q, start, stride_q, sizes.queries, BM, D, WIDTH, PARTIAL)
        do = load_tile(DO, start, stride_do, sizes.queries, BM, D, WIDTH, PARTIAL)
        m = start + tl.arange(0, BM)
        lse, delta = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
        if not SIGMOID:
            lse = exponent(load_row(LSE + line, m, sizes.queries, float("inf"), PARTIAL))
            delta = load_row(DELTA + line, m, sizes.queries, 0.0, PARTIAL)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        seen = True
        if PARTIAL:
            n = at[2] + tl.arange(0, BN)[:, None]
            seen = visible(TREE, mask, at[0], at[1], m[None, :], n, sizes.queries, sizes.keys)
        p, slope = probability(s, lse[None, :], seen, scores, SIGMOID, CAP, PARTIAL)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = gradient(p, dp, delta[None, :], slope, SIGMOID)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv
