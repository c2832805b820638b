"""Mask x spans -> exact counts: how many keys each query sees, and which keys any query sees."""

from typing import NamedTuple

import torch
from torch import Tensor

from .concrete import concrete
from .lower import Lowered, lower, see
from .mask import Mask
from .span import Spans, total
from .tile import Tiles, tiles

CPU = torch.device("cpu")
TILE = 64
AT_ONCE = 2**22  # pairs judged together: about 100 MB of int64 at a time
MOST = 2**30  # pairs in partial tiles up to which all are judged: 10 to 20 s of one core


class Cut(NamedTuple):
    """Tiles of TILE queries by TILE keys under a mask."""

    low: Lowered
    lists: Tiles
    queries: int
    keys: int


@concrete
def keys_per_query(mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int, *, most: int = MOST) -> Tensor:
    """Visible keys of each held query: int64 [tokens], summed over the mask's batch rows and over the kv
    heads, all of them if the mask tells them apart and else one.

    Exact unless more than `most` pairs lie in tiles that are neither empty nor full: then only some queries
    of each such tile are judged, evenly spaced, and stand for the others.
    """
    if not total(at_q) or not total(at_k):
        return torch.zeros(total(at_q), dtype=torch.int64)
    cut = _cut(mask, at_q, at_k, kv_heads)
    lists = cut.lists
    found = (lists.full.long().diff() * TILE).expand(-1, TILE).contiguous()
    row, column = _listed(lists.partial, lists.index)
    every = 1
    while len(row) * TILE * TILE // every > most and every < TILE:
        every *= 2
    inside = torch.arange(every // 2, TILE, every)
    step = max(1, AT_ONCE // (len(inside) * TILE))
    for rows, columns in zip(row.split(step), column.split(step), strict=True):
        counts = _judge(cut, rows, columns, inside).sum(2)
        found.index_add_(0, rows, counts.repeat_interleave(every, 1))
    return found.view(-1, lists.rows * TILE).sum(0)[: cut.queries]


@concrete
def keys_seen(mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int) -> Tensor:
    """Which held keys some held query sees, to the token: bool [1 or batch, 1 or kv heads, keys]."""
    shape = (mask.batch(), kv_heads if mask.per_head else 1, total(at_k))
    if not total(at_q) or not total(at_k):
        return torch.zeros(shape, dtype=torch.bool)
    cut = _cut(mask, at_q, at_k, kv_heads)
    lists = cut.lists
    seen = torch.zeros(lists.batch * lists.heads * lists.columns, TILE, dtype=torch.int32)
    row, column = _listed(lists.full, lists.index)
    seen[(row // lists.rows * lists.columns + column).unique()] = 1
    row, column = _listed(lists.partial, lists.index)
    key = row // lists.rows * lists.columns + column
    turn, last = _occurrence(key), 1
    # most keys of a tile are seen by the first query tiles that meet it: later ones need no judging then
    while len(row):
        now = turn < last
        parts = (x[now].split(AT_ONCE // TILE**2) for x in (row, column, key))
        for rows, columns, keys in zip(*parts, strict=True):
            seen.index_add_(0, keys, _judge(cut, rows, columns, torch.arange(TILE)).any(1).int())
        left = ~now & (seen == 0).any(1)[key]
        row, column, key, turn = (x[left] for x in (row, column, key, turn))
        last *= 2
    return (seen > 0).view(lists.batch, lists.heads, -1)[..., : cut.keys].expand(shape)


def _cut(mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int) -> Cut:
    low = lower(mask, at_q, at_k, kv_heads, CPU)
    lists = tiles(mask, at_q, at_k, kv_heads, size=(TILE, TILE), transpose=False, device=CPU)
    return Cut(low, lists, total(at_q), total(at_k))


def _listed(ranges: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the listed tiles, int64, from where each row's part of the index begins and
    ends.
    """
    count = ranges.long().diff()[:, 0]
    row = torch.arange(len(count)).repeat_interleave(count)
    place = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    return row, index[ranges[row, 0] + place].long()


def _occurrence(key: Tensor) -> Tensor:
    """How many equal elements stand before each."""
    order = key.argsort(stable=True)
    new = torch.ones(len(key), dtype=torch.bool)
    new[1:] = key[order[1:]] != key[order[:-1]]
    at = torch.arange(len(key))
    found = torch.empty_like(key)
    found[order] = at - at.where(new, 0).cummax(0).values
    return found


def _judge(cut: Cut, row: Tensor, column: Tensor, inside: Tensor) -> Tensor:
    """The predicate on the tiles (row, column) for the queries at `inside` of each: bool [tiles, queries,
    TILE].
    """
    low, lists = cut.low, cut.lists
    group = row // lists.rows
    q = (row % lists.rows * TILE)[:, None] + inside
    k = (column * TILE)[:, None] + torch.arange(TILE)
    held_q, held_k = q.clamp(max=cut.queries - 1), k.clamp(max=cut.keys - 1)
    batch = (group // lists.heads).clamp(max=low.tables_q.shape[1] - 1)[:, None]
    part = low._replace(tables_q=low.tables_q[:, batch, held_q], tables_k=low.tables_k[:, batch, held_k])
    head = torch.tensor(low.heads)[group % lists.heads].view(-1, 1, 1, 1)
    seen = see(part, low.tree, low.q[held_q][:, None, :, None], low.k[held_k][:, None, None], head)
    alive = (q < cut.queries)[:, :, None] & (k < cut.keys)[:, None]
    return seen.expand(-1, 1, -1, -1)[:, 0] & alive
