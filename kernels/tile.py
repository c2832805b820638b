"""Mask x spans -> which tiles hold work: lists of full and partial tiles, from position bounds alone."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .mask import Documents, Full, Lowered, Mask, Range, bound_heads, lower, visible
from .span import Span, Spans, bounds, total

CELLS = 2**24  # tile pairs classified at once: bounds the memory of building a list


class Tiles(NamedTuple):
    """For each row of tiles, the columns it must visit: the full ones first, then the partial ones, each
    ascending.

    Row r = (b * heads + h) * tiles + i. Forward and dQ have query tiles as rows; the transposed lists have
    key tiles. `batch` and `heads` are 1 where the mask does not tell them apart.
    """

    batch: int
    heads: int
    rows: int  # tiles a (batch, head)
    columns: int
    start: Tensor  # int32 [batch * heads * rows + 1]: where each row's list starts
    full: Tensor  # int32 [batch * heads * rows]: how many of a row's tiles are full
    index: Tensor  # type: ignore[assignment]  # int32 [listed tiles]: columns; tuple has an index() too
    order: Tensor  # int32 [batch * heads * rows]: rows, longest first


def classify(mask: Mask, q: Range, k: Range, kv_heads: int) -> tuple[Tensor, Tensor]:
    """(some, every), bool [1 or batch, 1 or heads, q tiles, k tiles], from the bounds of tiles: q, k int64
    [tiles].
    """
    heads, of = bound_heads(mask, kv_heads)
    if not mask.per_head:
        heads = heads[:1]
    head = torch.tensor(heads, device=q.low.device)[None, :, None, None]
    each = (torch.arange(len(x.low), device=x.low.device) for x in (q, k))
    rows, columns = (
        x._replace(low=x.low.view(shape), high=x.high.view(shape), tile=i.view(shape[1:]))
        for x, i, shape in zip((q, k), each, ((1, 1, -1, 1), (1, 1, 1, -1)), strict=True)
    )
    some, every = mask.classify(rows, columns, head, of)
    shape = (mask.batch(), len(heads), len(q.low), len(k.low))
    return some.expand(shape), (every & some).expand(shape)


@lru_cache(maxsize=64)
def tiles(
    mask: Mask,
    at_q: Spans,
    at_k: Spans,
    kv_heads: int,
    *,
    size: tuple[int, int],
    transpose: bool,
    device: torch.device,
) -> Tiles:
    """Lists of tiles of `size` (queries, keys) held tokens. Built on `device`; never from a matrix of
    tokens.
    """
    q, k = Range(*bounds(at_q, size[0], device)), Range(*bounds(at_k, size[1], device))
    rows, columns = (len(k.low), len(q.low)) if transpose else (len(q.low), len(k.low))
    groups = mask.batch() * (kv_heads if mask.per_head else 1)
    step = max(1, CELLS // max(1, groups * columns))
    parts = []
    for first in range(0, max(rows, 1), step):
        piece = slice(first, first + step)
        if transpose:
            some, every = classify(mask, q, Range(k.low[piece], k.high[piece]), kv_heads)
            some, every = some.mT, every.mT
        else:
            some, every = classify(mask, Range(q.low[piece], q.high[piece]), k, kv_heads)
        parts.append(_listed(some, every))
    batch, heads = some.shape[:2]
    return _join(parts, batch, heads, rows, columns)


def _listed(some: Tensor, every: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of listed and full tiles, [batch, heads, rows], and the columns, [listed], in row order, full
    ones first.
    """
    full, partial = every, some & ~every
    both = torch.cat((full, partial), -1)
    index = both.nonzero()[:, -1] % some.shape[-1]
    return both.sum(-1, dtype=torch.int32), full.sum(-1, dtype=torch.int32), index.int()


def _join(
    parts: list[tuple[Tensor, Tensor, Tensor]], batch: int, heads: int, rows: int, columns: int
) -> Tiles:
    count = torch.cat([p[0] for p in parts], 2)
    full = torch.cat([p[1] for p in parts], 2).flatten()
    if len(parts) == 1 or batch * heads == 1:
        index = torch.cat([p[2] for p in parts])
    else:  # each part is sorted by group first: bring the groups of all the parts together
        split = [p[2].split(p[0].sum(2).flatten().tolist()) for p in parts]
        index = torch.cat([piece for group in zip(*split, strict=True) for piece in group])
    count = count.flatten()
    start = torch.zeros(len(count) + 1, dtype=torch.int32, device=count.device)
    start[1:] = count.cumsum(0)
    order = count.argsort(descending=True, stable=True).int()
    return Tiles(batch, heads, rows, columns, start, full, index, order)


def needed(mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int, *, tile: int = 128) -> bool:
    """Whether any query at `at_q` may see any key at `at_k`: false only if surely none does."""
    if not total(at_q) or not total(at_k):
        return False
    q, k = Range(*bounds(at_q, tile)), Range(*bounds(at_k, tile))
    return bool(classify(mask, q, k, kv_heads)[0].any())


def area(mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int, *, tile: int = 128) -> int:
    """Visible (query, key) pairs, summed over the mask's batch rows and averaged over kv heads, rounded
    down.
    """
    if not total(at_q) or not total(at_k):
        return 0
    low = lower(mask, at_q, at_k, kv_heads, torch.device("cpu"))
    lists = tiles(mask, at_q, at_k, kv_heads, size=(tile, tile), transpose=False, device=torch.device("cpu"))
    pairs = 0
    for row, column, full in listed(lists):
        group, i = divmod(row, lists.rows)
        if full:
            pairs += (min(tile * (i + 1), total(at_q)) - tile * i) * (
                min(tile * (column + 1), total(at_k)) - tile * column
            )
        else:
            pairs += int(tile_visible(low, group, lists.heads, (i, column), (tile, tile)).sum())
    return pairs // lists.heads


def listed(lists: Tiles) -> list[tuple[int, int, bool]]:
    """The lists as (row, column, full) triples."""
    start, full, index = lists.start.tolist(), lists.full.tolist(), lists.index.tolist()
    return [
        (row, index[at], at - start[row] < full[row])
        for row in range(len(full))
        for at in range(start[row], start[row + 1])
    ]


def tile_visible(low: Lowered, group: int, heads: int, at: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The predicate on one tile of one (batch, head) group: bool, broadcast to [size q, size k] (less at the
    ends).
    """
    row, head = divmod(group, heads)
    q, k = (slice(i * n, (i + 1) * n) for i, n in zip(at, size, strict=True))
    row = min(row, low.tables_q.shape[1] - 1)
    part = low._replace(
        heads=low.heads[head : head + 1],
        q=low.q[q],
        k=low.k[k],
        tables_q=low.tables_q[:, row : row + 1, q],
        tables_k=low.tables_k[:, row : row + 1, k],
    )
    return visible(part)[0, 0].expand(len(part.q), len(part.k))


@lru_cache(maxsize=4096)
def pairs(mask: Mask, length: int, kv_heads: int) -> int:
    """`area` of a whole sequence of `length` tokens; documents are counted one by one, each length once."""
    if isinstance(mask, Documents):
        inner, total_pairs = mask.inner or Full(), 0
        for row in mask.rows():
            ends = (*row[1:], length)
            total_pairs += sum(
                pairs(inner, min(b, length) - a, kv_heads)
                for a, b in zip(row, ends, strict=True)
                if a < length
            )
        return total_pairs
    whole = (Span(0, length),) if length else ()
    return area(mask, whole, whole, kv_heads)
