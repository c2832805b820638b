"""What ranks need of each other, from mask and placement alone: who needs whom, and the fewest bytes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.cells import Grid, strips
from ..kernels.concrete import concrete
from ..kernels.count import keys_seen
from ..kernels.mask import Mask, Range
from ..kernels.span import Spans, positions
from ..kernels.tile import classify
from .placement import Placement

AT_ONCE = 2**22  # pairs of tiles judged together


class Bytes(NamedTuple):
    """Of one layer, on one rank: what must arrive for the forward, and what must move for the backward."""

    forward: int
    backward: int


class Tiled(NamedTuple):
    """Tokens of several owners in tiles that none of them shares with another."""

    tiles: Range
    owner: Tensor  # int64 [tiles], ascending
    owners: int


@concrete
def foreign_keys(mask: Mask, placement: Placement, rank: int, kv_heads: int, *, batch: int = 1) -> int:
    """(batch row, kv head, key) triples of other ranks' tokens that some query of `rank` sees, to the token.

    batch: rows of q and k, over which a mask that does not tell rows apart counts so many times.
    """
    others = tuple(s for r, spans in enumerate(placement.spans_by_rank) if r != rank for s in spans)
    seen = keys_seen(mask, placement.spans_by_rank[rank], others, kv_heads)
    return int(seen.sum()) * (kv_heads // seen.shape[1]) * (batch // seen.shape[0])


def needed_bytes(
    mask: Mask, placement: Placement, rank: int, *, kv_heads: int, head_dim: int, dtype: torch.dtype,
    batch: int = 1,
) -> Bytes:  # fmt: skip
    """The fewest bytes that exact attention of the queries of `rank` moves where keys travel: their keys and
    values from other ranks once; in backward the same again, for keeping them would cost the memory that
    ranks are there to save, and the float32 gradients of both home.
    """
    numbers = 2 * head_dim * foreign_keys(mask, placement, rank, kv_heads, batch=batch)
    return Bytes(numbers * dtype.itemsize, numbers * (dtype.itemsize + torch.float32.itemsize))


@concrete
def meets(
    mask: Mask, queries: Sequence[Spans], keys: Sequence[Spans], kv_heads: int, *, tile: int = 128
) -> Tensor:
    """Whether any query of queries[i] may see any key of keys[j], false only if surely none does: bool
    [queries, keys]. In one pass over the tiles, none of which reaches over the end of a span.
    """
    found = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    (q, q_owner), (k, k_owner) = _by_span(queries, tile), _by_span(keys, tile)
    first = 0
    for strip in strips(Grid(mask, q, k, kv_heads)) if len(q_owner) and len(k_owner) else ():
        owner = q_owner[first : first + len(strip.each)]
        first += len(strip.each)
        found[owner.unique()[:, None], k_owner[strip.whole.flatten(0, 1).amax(0) > 0].unique()] = True
        row, column = strip.each.nonzero().T
        found[owner[row], k_owner[strip.mixed[2, column]]] = True
    return found


@concrete
def blocks_met(mask: Mask, q: Tiled, k: Tiled, kv_heads: int) -> Tensor:
    """Which tiles of keys some query of each owner may see, false only if surely none does: bool [owners of
    queries, 1 or kv heads, key tiles].

    Each pair of tiles is judged by itself: whoever asks about it, among whatever others, gets one answer.
    """
    heads = kv_heads if mask.per_head else 1
    found = torch.zeros(q.owners, heads, len(k.owner), dtype=torch.int32)
    step = max(1, AT_ONCE // max(1, heads * len(k.owner) * mask.batch()))
    for rows in torch.arange(len(q.owner)).split(step) if len(k.owner) else ():
        assert q.tiles.at is not None
        part = Range(q.tiles.low[rows], q.tiles.high[rows], q.tiles.at[:, rows], known={})
        some, _ = classify(mask, part, k.tiles, kv_heads)
        found.index_add_(0, q.owner[rows], some.any(0).transpose(0, 1).int())
    return found > 0


def tiled(parts: Sequence[Spans], tile: int) -> Tiled:
    """Tiles of `tile` held tokens of each part; its last one may be short and repeats its last position."""
    rows, owner = [], []
    for i, spans in enumerate(parts):
        at = positions(spans)
        if len(at):
            rows.append(torch.cat((at, at[-1:].expand(-len(at) % tile))).view(-1, tile))
            owner += [i] * len(rows[-1])
    at = torch.cat(rows) if rows else torch.zeros(0, tile, dtype=torch.int64)
    tiles = Range(at.amin(1), at.amax(1), at[None], known={})
    return Tiled(tiles, torch.tensor(owner, dtype=torch.int64), len(parts))


def _by_span(parts: Sequence[Spans], tile: int) -> tuple[Range, Tensor]:
    """Tiles of each span of each part, and the part that each is of."""
    each = [(i, span) for i, spans in enumerate(parts) for span in spans]
    found = tiled([(span,) for _, span in each], tile)
    return found.tiles, torch.tensor([i for i, _ in each], dtype=torch.int64)[found.owner]
