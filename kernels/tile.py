"""Mask x spans -> which tiles hold work: lists of full and partial tiles, from position bounds alone."""

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import Grid, cells, held, kinds, strips
from .concrete import concrete
from .fields import at_least_one
from .kept import kept
from .lists import ranges
from .lower import Lowered, lower, visible
from .mask import Documents, Full, Mask, Range, bound_heads
from .neighborhood import Neighborhood
from .ordered import BrickByBrick
from .span import Span, Spans, total


class Tiles(NamedTuple):
    """For each row of tiles, the columns it must visit.

    Row r = (b * heads + h) * tiles + i. Forward and dQ have query tiles as rows; the transposed lists have
    key tiles. `batch` and `heads` are 1 where the mask does not tell them apart. `index` begins with all the
    columns in order, and rows whose tiles are neighbours share that part: lists of a causal mask take no
    memory. No tile that the end of the columns cuts is full.
    """

    batch: int
    heads: int
    rows: int  # tiles a (batch, head)
    columns: int
    full: Tensor  # int32 [batch * heads * rows, 2]: where in `index` the row's full tiles begin and end
    partial: Tensor  # int32, the same of the partial ones
    index: Tensor  # type: ignore[assignment]  # int32: columns; tuple has an index() too
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


@kept()
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
    tokens. ValueError for a size below 1.
    """
    at_least_one("tiles.", queries=size[0], keys=size[1])
    counts = (-(-total(at_q) // size[0]), -(-total(at_k) // size[1]))
    if 0 in counts:
        none = torch.zeros(1, 1, *(counts[::-1] if transpose else counts), dtype=torch.bool, device=device)
        return chosen(none, none, tokens=0, size=1)
    # only the end of the columns matters: the kernels guard their own rows at all times
    short = transpose and total(at_q) % size[0] > 0, not transpose and total(at_k) % size[1] > 0
    found = cells(Grid(mask, held(at_q, size[0], device), held(at_k, size[1], device), kv_heads, short))
    batch, _, _, keys = found.whole.shape
    rows, columns = (keys, found.rows) if transpose else (found.rows, keys)
    full, partial, index = ranges(found, transpose)
    # heads that see the same have the same ranges of one index
    like = torch.tensor(kinds(mask, kv_heads)[1], device=device)
    full, partial = (x.view(batch, -1, rows, 2)[:, like].flatten(0, 2) for x in (full, partial))
    return _ordered(batch, len(like), rows, columns, full, partial, index)


def chosen(some: Tensor, every: Tensor, *, tokens: int, size: int) -> Tiles:
    """Lists made at run time: which tiles to visit, and which of them are full.

    some, every: bool [1 or batch, 1 or kv heads, rows, columns], where the columns are `tokens` tokens in
    tiles of `size`. A tile that is not visited or that the end of the columns cuts is not full, whatever
    `every` says: a kernel would read beyond the tensor.
    """
    if some.ndim != 4 or some.shape != every.shape or {some.dtype, every.dtype} != {torch.bool}:
        raise ValueError(
            f"some and every are {some.dtype} {tuple(some.shape)} and {every.dtype} {tuple(every.shape)}; "
            "they must be bool [1 or batch, 1 or kv heads, rows, columns]"
        )
    batch, heads, rows, columns = some.shape
    if tokens and columns != -(-tokens // size):
        raise ValueError(f"{tokens} tokens are {-(-tokens // size)} tiles of {size}, but some has {columns}")
    every = every & some
    if tokens % size:
        every[..., -1] = False
    kinds = [x.flatten(0, 2) for x in (every, some & ~every)]
    counts = torch.stack([x.sum(1) for x in kinds])
    ends = counts.flatten().cumsum(0).view_as(counts)
    full, partial = torch.stack((ends - counts, ends), 2).int()
    index = torch.cat([x.nonzero()[:, 1] for x in kinds]).int()
    return _ordered(batch, heads, rows, columns, full, partial, index)


def check_lists(lists: Tiles, batch: int, heads: int, tokens: tuple[int, int], size: tuple[int, int]) -> None:
    """Raise ValueError unless the lists are for so many batch rows and kv heads, and so many tokens in rows
    and in columns, in tiles of `size`. What they list is trusted: `tiles` and `chosen` list no other tiles.
    """
    rows, columns = (-(-n // each) for n, each in zip(tokens, size, strict=True))
    fits = lists.batch in (1, batch) and lists.heads in (1, heads)
    if not fits or (lists.rows, lists.columns) != (rows, columns):
        raise ValueError(
            f"lists are of {lists.batch} rows, {lists.heads} heads, {lists.rows} x {lists.columns} tiles; "
            f"they must be of 1 or {batch}, 1 or {heads}, and {rows} x {columns} of {size[0]} x {size[1]}"
        )
    count = lists.batch * lists.heads * rows
    for name, shape in (("full", (count, 2)), ("partial", (count, 2)), ("order", (count,))):
        x: Tensor = getattr(lists, name)
        if x.shape != shape or x.dtype != torch.int32 or not x.is_contiguous():
            raise ValueError(
                f"lists.{name} is {x.dtype} {tuple(x.shape)}; it must be torch.int32 {shape}, contiguous"
            )
    if lists.index.ndim != 1 or lists.index.dtype != torch.int32 or not lists.index.is_contiguous():
        raise ValueError(f"lists.index is {lists.index.dtype}; it must be int32, contiguous, of one axis")


def _ordered(
    batch: int, heads: int, rows: int, columns: int, full: Tensor, partial: Tensor, index: Tensor
) -> Tiles:
    order = (full + partial).diff().flatten().argsort(descending=True, stable=True).int()
    return Tiles(batch, heads, rows, columns, full, partial, index, order)


@concrete
def needed(mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int, *, tile: int = 128) -> bool:
    """Whether any query at `at_q` may see any key at `at_k`: false only if surely none does. ValueError for
    a tile below 1.
    """
    at_least_one(tile=tile)
    if not total(at_q) or not total(at_k):
        return False
    cpu = torch.device("cpu")
    grid = Grid(mask, held(at_q, tile, cpu), held(at_k, tile, cpu), kv_heads)
    return any(bool(strip.whole.any()) or strip.each.numel() > 0 for strip in strips(grid))


@concrete
def area(mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int, *, tile: int = 64) -> int:
    """Visible (query, key) pairs, summed over the mask's batch rows and averaged over kv heads, rounded
    down. ValueError for a tile below 1.
    """
    at_least_one(tile=tile)
    if not total(at_q) or not total(at_k):
        return 0
    cpu = torch.device("cpu")
    low = lower(mask, at_q, at_k, kv_heads, cpu)
    lists = tiles(mask, at_q, at_k, kv_heads, size=(tile, tile), transpose=False, device=cpu)
    pairs, inside = 0, torch.arange(tile)
    for row, (full, partial) in enumerate(zip(lists.full.tolist(), lists.partial.tolist(), strict=True)):
        group, i = divmod(row, lists.rows)
        q = slice(tile * i, min(tile * (i + 1), total(at_q)))
        pairs += (q.stop - q.start) * (full[1] - full[0]) * tile
        if partial[0] < partial[1]:
            k = (lists.index[slice(*partial)].long()[:, None] * tile + inside).flatten()
            pairs += int(seen(low, group, lists.heads, q=q, k=k[k < total(at_k)]).sum())
    return pairs // lists.heads


def listed(lists: Tiles) -> list[tuple[int, int, bool]]:
    """The lists as (row, column, full) triples."""
    full, partial, index = lists.full.tolist(), lists.partial.tolist(), lists.index.tolist()
    return [
        (row, column, kind is full)
        for row in range(len(full))
        for kind in (full, partial)
        for column in index[slice(*kind[row])]
    ]


def seen(low: Lowered, group: int, heads: int, *, q: slice, k: Tensor) -> Tensor:
    """The predicate on some held queries and keys of one (batch, head) group: bool [queries, keys]."""
    row, head = divmod(group, heads)
    row = min(row, low.tables_q.shape[1] - 1)
    part = low._replace(
        heads=low.heads[head : head + 1],
        q=low.q[q],
        k=low.k[k],
        tables_q=low.tables_q[:, row : row + 1, q],
        tables_k=low.tables_k[:, row : row + 1, k],
    )
    return visible(part)[0, 0].expand(len(part.q), len(part.k))


@concrete
def pairs(mask: Mask, length: int, kv_heads: int) -> int:
    """`area` of a whole sequence of `length` tokens; documents are counted one by one, each length once."""
    if isinstance(mask, Documents) and (mask.inner is None or mask.inner.batch() == 1):
        inner, total_pairs = mask.inner or Full(), 0
        for row in mask.rows():
            ends = (*row[1:], length)
            total_pairs += sum(
                pairs(inner, min(b, length) - a, kv_heads)
                for a, b in zip(row, ends, strict=True)
                if a < length
            )
        return total_pairs
    if isinstance(mask, BrickByBrick) and length == prod(mask.grid):
        return pairs(mask.inner, length, kv_heads)
    return _whole(mask, length, kv_heads)


@lru_cache(maxsize=4096)
def _whole(mask: Mask, length: int, kv_heads: int) -> int:
    known = mask.counted(length) if isinstance(mask, Neighborhood) else None
    if known is not None:
        return known
    whole = (Span(0, length),) if length else ()
    return area(mask, whole, whole, kv_heads)
