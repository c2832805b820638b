"""Attention on the CPU: a mask cut into a few calls of torch's own flash operator, over blocks of tiles."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask import Lowered, Mask, Range, Unsupported, lower, visible
from .options import AttentionOptions
from .span import Span, Spans, cut
from .tile import classify

CACHED = 2**24  # (query, key) pairs up to which a plan is kept: bounds the memory of the masks in it
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Step(NamedTuple):
    """One call of the operator: a run of local queries over runs of local keys."""

    rows: slice
    keys: Spans
    causal: bool = False  # the i-th of the rows sees the j-th of the keys iff j <= i
    seen: Tensor | None = None  # bool [rows, keys]; None: what `causal` says


class Group(NamedTuple):
    """Batch rows, query heads and kv heads that share a plan."""

    batch: slice
    q_heads: slice
    kv_heads: slice
    plan: Iterable[Step]


class Work(NamedTuple):
    """What the backward operator reads: [B, H, N, D], lse [B, Hq, Nq]. Its delta is rowsum(dout * out)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor


class Grid(NamedTuple):
    """The tiles of one (batch row, kv head): their borders in local tokens, and how they are classified."""

    low: Lowered
    q: list[int]
    k: list[int]
    full: Tensor  # bool [q tiles, k tiles]
    partial: Tensor


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
) -> tuple[Tensor, Tensor]:
    """q [B, Nq, Hq, D], k, v [B, Nk, Hkv, D] -> out [B, Nq, Hq, D], lse [B, Hq, Nq]; float32, or float64 for it.

    Half precision is computed in float32: the operator would round `out`, a partial result, to the inputs' dtype.
    """
    _refuse(q, options)
    scale = options.scaling(q.shape[-1])
    out = torch.zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32)).transpose(1, 2)
    q, k, v = _heads_first(q, k, v)
    lse = q.new_full(q.shape[:3], float("-inf"))
    for group in _groups(mask, low, at_q, at_k, q.shape[1]):
        written = 0
        for step in group.plan:
            at_rows = group.batch, group.q_heads, step.rows
            keys = (_take(x[group.batch, group.kv_heads], step.keys) for x in (k, v))
            part = _operate(q[at_rows], *keys, step, scale)
            if step.rows.stop > written:
                out[at_rows], lse[at_rows] = part
            else:
                _add(out[at_rows], lse[at_rows], *part)
            written = step.rows.stop
    return out.transpose(1, 2), lse


def backward(
    dout: Tensor, delta: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, mask: Mask,
    low: Lowered, at_q: Spans, at_k: Spans, options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv over these keys from the whole row's lse and delta [B, Hq, Nq]; float32, or float64 for it."""
    _refuse(q, options)
    assert lse is not None and delta is not None
    scale = options.scaling(q.shape[-1])
    q, k, v, dout = _heads_first(q, k, v, dout)
    dead = lse.isinf()
    delta = delta.to(q.dtype).masked_fill(dead, 0.0)
    # exp(score - the largest number) is 0, and with it every gradient of the row
    lse = lse.to(q.dtype).masked_fill(dead, torch.finfo(q.dtype).max)
    out, lost = _stand_in(dout, delta)
    found = dout.masked_fill(lost[..., None], 0.0) if lost.any() else dout
    grads = _sweep(Work(q, k, v, found, out, lse), _groups(mask, low, at_q, at_k, q.shape[1]), scale)
    if lost.any():
        rest = _widened(Work(q, k, v, dout, out, lse), delta, lost)
        extra = _sweep(rest, _groups(mask, low, at_q, at_k, q.shape[1]), scale)
        grads = [a + b[..., :-1] for a, b in zip(grads, extra, strict=True)]
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def _refuse(q: Tensor, options: AttentionOptions) -> None:
    if not supports(q, options):
        raise Unsupported(
            f"backend='cpu' does softmax without softcap on CPU tensors, not {options.normalizer} with "
            f"softcap {options.softcap} on {q.device.type}, {q.dtype}; backend='reference' does"
        )


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[B, N, H, D] -> [B, H, N, D] in the partial dtype; the operator wants stride 1 in D."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [(x if x.stride(-1) == 1 else x.contiguous()).to(dtype).transpose(1, 2) for x in tensors]


def _groups(mask: Mask, low: Lowered, at_q: Spans, at_k: Spans, q_heads: int) -> Iterator[Group]:
    rows, kv_heads = low.tables_q.shape[1], len(low.heads)
    heads = kv_heads if mask.per_head else 1
    shares = q_heads // heads, kv_heads // heads
    make = _kept_plan if len(low.q) * len(low.k) <= CACHED else plan
    for row in range(rows):
        batch = slice(row, row + 1) if rows > 1 else slice(None)
        for head in range(heads):
            own = (slice(head * n, (head + 1) * n) for n in shares)
            yield Group(batch, *own, make(mask, at_q, at_k, kv_heads, (row, head)))


def _operate(q: Tensor, k: Tensor, v: Tensor, step: Step, scale: float) -> tuple[Tensor, Tensor]:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = operator(q, k, v, 0.0, step.causal, attn_mask=_bias(step, q.dtype), scale=scale)
    if step.seen is not None:
        # the operator says lse = 0 for a row without keys
        lse = lse.masked_fill(~step.seen.any(1), float("-inf"))
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
        for step in group.plan:
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
    return torch.zeros(step.seen.shape, dtype=dtype).masked_fill_(~step.seen, float("-inf"))


def _take(x: Tensor, keys: Spans) -> Tensor:
    parts = [x[:, :, s.start : s.start + s.length] for s in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _put(target: Tensor, keys: Spans, grad: Tensor) -> None:
    for s, part in zip(keys, grad.split([s.length for s in keys], 2), strict=True):
        target[:, :, s.start : s.start + s.length] += part


@lru_cache(maxsize=32)
def _kept_plan(
    mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int, group: tuple[int, int]
) -> tuple[Step, ...]:
    return tuple(plan(mask, at_q, at_k, kv_heads, group))


def plan(mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int, group: tuple[int, int]) -> Iterator[Step]:
    """The steps of one (batch row, kv head), rows ascending; steps of the same rows follow each other."""
    grid = _grid(mask, at_q, at_k, kv_heads, group)
    first = 0
    last: Tensor | None = None
    while first < len(grid.q) - 1:
        count, steps = _next_steps(grid, first)
        for step in steps:
            # windows look alike in every row: hold the mask once
            alike = step.seen is not None and last is not None and torch.equal(step.seen, last)
            last = last if alike else step.seen
            yield step._replace(seen=last)
        first += count


def _grid(mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int, group: tuple[int, int]) -> Grid:
    low = lower(mask, at_q, at_k, kv_heads, torch.device("cpu"))
    row, head = group
    low = low._replace(
        heads=low.heads[head : head + 1],
        tables_q=low.tables_q[:, row : row + 1],
        tables_k=low.tables_k[:, row : row + 1],
    )
    tile = 128 if max(len(low.q), len(low.k)) <= 2048 else 256
    q = _borders(at_q, low.tables_q, tile)
    k = _borders(at_k, low.tables_k, tile)
    some, every = classify(mask, _bounds(low.q, q), _bounds(low.k, k), kv_heads)
    some, every = some[row, head], every[row, head]
    return Grid(low, q, k, every, some & ~every)


def _borders(spans: Spans, tables: Tensor, tile: int) -> list[int]:
    """Where tiles begin and end: where spans and documents end, so that few are partial; else every `tile` tokens."""
    n = tables.shape[-1]
    changes = (tables[:, 0, 1:] != tables[:, 0, :-1]).any(0).nonzero().flatten() + 1
    ends, at = set(changes.tolist()) | {n}, 0
    for span in spans:
        at += span.length
        ends.add(at)
    borders = [0]
    for end in sorted(ends):
        if end == n or end - borders[-1] >= tile // 4:
            borders += [*range(borders[-1] + tile, end, tile), end]
    return borders


def _bounds(at: Tensor, borders: list[int]) -> Range:
    size = torch.tensor(borders).diff()
    tile = torch.repeat_interleave(torch.arange(len(size)), size)
    empty = torch.zeros(len(size), dtype=torch.int64)
    return Range(
        *(empty.scatter_reduce(0, tile, at.long(), how, include_self=False) for how in ("amin", "amax"))
    )


def _next_steps(grid: Grid, i: int) -> tuple[int, list[Step]]:
    """How many rows of tiles, from row i, and the steps that do them."""
    n = _triangle(grid, i)
    if n:
        c = int(grid.partial[i].nonzero()[0])
        steps = [Step(_rows(grid, i, n), _keys(grid.k, list(range(c, c + n))), causal=True)]
    elif grid.partial[i].any():
        n, steps = 1, _masked(grid, i)
        return n, steps
    else:
        n, steps = _alike(grid, i), []
    columns = grid.full[i].nonzero().flatten().tolist()
    return n, [Step(_rows(grid, i, n), _keys(grid.k, columns)), *steps] if columns else steps


def _triangle(grid: Grid, i: int) -> int:
    """Rows of tiles from i on that see the same full tiles and an exactly causal triangle; 0 for none."""
    if grid.partial[i].sum() != 1:
        return 0
    c, n = int(grid.partial[i].nonzero()[0]), 0
    full, partial = grid.full[i].clone(), grid.partial[i].clone()
    while (
        i + n < len(grid.full)
        and torch.equal(grid.full[i + n], full)
        and torch.equal(grid.partial[i + n], partial)
    ):
        if not _diagonal(grid, i + n, c + n):
            break
        full[c + n], partial[c + n] = True, False
        n += 1
        if c + n == len(full):
            break
        partial[c + n] = True
    return n


def _diagonal(grid: Grid, i: int, j: int) -> bool:
    size = grid.q[i + 1] - grid.q[i]
    return size == grid.k[j + 1] - grid.k[j] and torch.equal(_seen(grid, i, j), _tril(size))


def _tril(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


def _alike(grid: Grid, i: int) -> int:
    """Rows of tiles from i on with the same full tiles and no partial ones."""
    n = 1
    while (
        i + n < len(grid.full)
        and not grid.partial[i + n].any()
        and torch.equal(grid.full[i + n], grid.full[i])
    ):
        n += 1
    return n


def _masked(grid: Grid, i: int) -> list[Step]:
    """The steps of one row of tiles with partial ones."""
    rows, full = _rows(grid, i, 1), grid.full[i]
    size = torch.tensor(grid.k).diff()
    steps, columns = [], (full | grid.partial[i]).nonzero().flatten().tolist()
    if size[full].sum() > 4 * size[grid.partial[i]].sum():
        # a call more costs less than a mask over everything
        steps.append(Step(rows, _keys(grid.k, full.nonzero().flatten().tolist())))
        columns = grid.partial[i].nonzero().flatten().tolist()
    high = rows.stop - rows.start
    known = torch.ones(high, int(size.max()), dtype=torch.bool)
    seen = torch.cat([known[:, : size[j]] if full[j] else _seen(grid, i, j) for j in columns], 1)
    alive = seen.any(0).nonzero().flatten().tolist()
    if not alive:
        return steps
    keys = cut(_keys(grid.k, columns), alive[0], alive[-1] + 1)
    seen = seen[:, alive[0] : alive[-1] + 1]
    if seen.all():
        return [*steps, Step(rows, keys)]
    causal = seen.shape == (high, high) and torch.equal(seen, _tril(high))
    return [*steps, Step(rows, keys, causal, None if causal else seen)]


def _rows(grid: Grid, i: int, n: int) -> slice:
    return slice(grid.q[i], grid.q[i + n])


def _keys(borders: list[int], columns: list[int]) -> Spans:
    """Runs of local keys in these tiles."""
    runs: list[Span] = []
    for j in columns:
        start, stop = borders[j], borders[j + 1]
        if runs and runs[-1].start + runs[-1].length == start:
            start = runs.pop().start
        runs.append(Span(start, stop - start))
    return tuple(runs)


def _seen(grid: Grid, i: int, j: int) -> Tensor:
    """The predicate on one tile: bool [queries, keys]."""
    q, k = slice(*grid.q[i : i + 2]), slice(*grid.k[j : j + 2])
    low = grid.low
    part = low._replace(q=low.q[q], k=low.k[k], tables_q=low.tables_q[..., q], tables_k=low.tables_k[..., k])
    return visible(part)[0, 0].expand(len(part.q), len(part.k))
