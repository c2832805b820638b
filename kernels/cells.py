"""Mask x tiles -> cells, each some query tiles by one key tile, judged whole where that says it all."""

from collections.abc import Hashable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .mask import Bound, Mask, Range, bound_heads
from .span import Spans, positions

HEIGHT = 64  # query tiles in a cell
EMPTY, PARTIAL, FULL = 0, 1, 2


class Cells(NamedTuple):
    """What the tiles of each cell are: all of them, or one by one in the `mixed` cells."""

    rows: int  # query tiles
    whole: Tensor  # uint8 [batch, heads, blocks of query tiles, key tiles]; EMPTY where mixed
    mixed: Tensor  # int64 [4, mixed]: batch row, head, block, key tile
    each: Tensor  # uint8 [query tiles of a block, mixed]; EMPTY beyond the last query tile


class Strip(NamedTuple):
    """The cells of one block of query tiles."""

    whole: Tensor  # uint8 [batch, heads, key tiles]
    mixed: Tensor  # int64 [3, mixed]: batch row, head, key tile
    each: Tensor  # uint8 [query tiles, mixed]


class Grid(NamedTuple):
    """Tiles of queries and keys, Ranges over [tiles], under a mask."""

    mask: Mask
    q: Range
    k: Range
    kv_heads: int
    short: tuple[bool, bool] = (False, False)  # whether the last tile of queries, of keys, is never full


def held(spans: Spans, tile: int, device: torch.device) -> Range:
    """Bounds and positions of the tiles of `tile` held tokens; a short last one repeats its last position."""
    at = positions(spans, device)
    at = torch.cat((at, at[-1:].expand(-len(at) % tile))).view(-1, tile)
    low, high = at.aminmax(dim=1)
    return Range(low, high, at[None], known={})


def cells(grid: Grid) -> Cells:
    """All cells of a grid that has tiles."""
    found = list(strips(grid))
    height = len(found[0].each)
    each = [torch.nn.functional.pad(x.each, (0, 0, 0, height - len(x.each))) for x in found]
    mixed = [
        torch.cat((x.mixed[:2], torch.full_like(x.mixed[:1], i), x.mixed[2:])) for i, x in enumerate(found)
    ]
    whole = torch.stack([x.whole for x in found], 2)
    return Cells(len(grid.q.low), whole, torch.cat(mixed, 1), torch.cat(each, 1))


def kinds(mask: Mask, kv_heads: int) -> tuple[list[int], list[int]]:
    """One global kv head of each kind, and of each local head which of these it is like; of a mask that does
    not tell heads apart, one for all.
    """
    heads, of = bound_heads(mask, kv_heads)
    if not mask.per_head:
        return [heads[0]], [0]
    of_kind: dict[Hashable, int] = {}
    bare = mask.mask if isinstance(mask, Bound) else mask
    like = [of_kind.setdefault(bare.kind(head, of), len(of_kind)) for head in heads]
    return [heads[like.index(i)] for i in range(len(of_kind))], like


def strips(grid: Grid) -> Iterator[Strip]:
    """Block after block of query tiles, so that the memory at a time does not grow with their number. Heads
    are `kinds` of them.
    """
    _, of = bound_heads(grid.mask, grid.kv_heads)
    head = torch.tensor(kinds(grid.mask, grid.kv_heads)[0], device=grid.q.low.device)
    for first in range(0, len(grid.q.low), HEIGHT):
        yield _strip(grid, slice(first, first + HEIGHT), head, of)


def _strip(grid: Grid, rows: slice, head: Tensor, of: int) -> Strip:
    mask, q, k = grid.mask, grid.q, grid.k
    tile = torch.arange(len(k.low), device=head.device)
    shape = mask.batch(), len(head), 1, len(tile)
    found = mask.classify(_block(q, rows), _pick(k, tile), head.view(1, -1, 1, 1), of)
    some, every = (x.expand(shape)[:, :, 0] for x in found)
    last = rows.stop >= len(q.low)
    full = some & every & (not (last and grid.short[0]))
    full[..., len(tile) - grid.short[1] :] = False
    # cells that some row of the batch cannot judge whole are judged tile by tile for all rows
    at_head, column = (some & ~full).any(0).nonzero().T
    own = torch.arange(len(q.low), device=head.device)[rows]
    found = mask.classify(_pick(q, own[:, None]), _pick(k, column), head[at_head].view(1, 1, 1, -1), of)
    some, every = (x.expand(shape[0], 1, len(own), len(column))[:, 0] for x in found)
    every = every & (column < len(tile) - grid.short[1])
    every[:, len(own) - (last and grid.short[0]) :] = False
    each = some.to(torch.uint8) + (some & every)  # [batch, query tiles, judged cells]
    low, high = each.amin(1), each.amax(1)
    whole = full.to(torch.uint8) * FULL
    whole[:, at_head, column] = torch.where(low == high, low, EMPTY)
    row, mixed = (low != high).nonzero().T
    return Strip(whole, torch.stack((row, at_head[mixed], column[mixed])), each[row, :, mixed].T)


def _block(q: Range, rows: slice) -> Range:
    """These tiles as one."""
    assert q.at is not None
    low, high = q.low[rows].amin().view(1, 1, 1, 1), q.high[rows].amax().view(1, 1, 1, 1)
    return Range(low, high, q.at[:, rows].flatten(1)[:, None], torch.zeros_like(low[0]))


def _pick(x: Range, tile: Tensor) -> Range:
    """Some tiles, as columns (or rows, if `tile` is [tiles, 1])."""
    tile = tile.view(1, -1, 1) if tile.ndim == 2 else tile.view(1, 1, -1)
    return x._replace(low=x.low[tile][None], high=x.high[tile][None], tile=tile)
