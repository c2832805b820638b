"""What the sparse masks mean, said a second time in plain Python; some of each, and compositions."""

from bisect import bisect_right
from functools import lru_cache, partial
from itertools import product
from random import Random
from typing import Any

import torch
from torch import Tensor

import masks
from longspan.kernels.cells import held
from longspan.kernels.heads import Heads, PerHead
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import And, Bound, Causal, Documents, First, Full, Mask, Or, Range, Window
from longspan.kernels.neighborhood import Frames, FrameTiles, Neighborhood
from longspan.kernels.ordered import BrickByBrick, Windows
from longspan.kernels.patterns import Anchored, BlockPermutation, Chunks, Shifted, Strided, Tail
from longspan.kernels.span import Span, Spans, bounds, total
from longspan.kernels.tile import classify

CPU = torch.device("cpu")
KV_HEADS = 4
WHOLE = (Span(0, 60),)


def sees(mask: Mask, q: int, k: int, *, h: int = 0, of: int = 1, row: int = 0) -> bool:
    """Whether the query at position q sees the key at k, for kv head h of `of` and one row of the batch."""
    again = partial(sees, h=h, of=of, row=row)
    match mask:
        case Bound():
            return sees(mask.mask, q, k, h=mask.kv_indices[h], of=mask.of, row=row)
        case And(left, right):
            return again(left, q, k) and again(right, q, k)
        case Or(left, right):
            return again(left, q, k) or again(right, q, k)
        case PerHead(each):
            return again(each[h], q, k)
        case Documents(offsets, inner):
            starts: Any = offsets[row] if isinstance(offsets[0], tuple) else offsets
            of_q, of_k = (starts[bisect_right(starts, p) - 1] for p in (q, k))
            return of_q == of_k and again(inner or Full(), q - of_q, k - of_k)
        case BrickByBrick(inner, grid, brick):
            places = by_brick(tuple(grid), tuple(brick))  # type: ignore[arg-type]
            return again(inner, places[q], places[k])
    found = pattern_sees(mask, q, k, h, of)
    return masks.sees(mask, q, k, head=h, row=row) if found is None else found


def pattern_sees(mask: Mask, q: int, k: int, h: int, of: int) -> bool | None:
    match mask:
        case Heads(start, stop):
            return h in range(start, stop)
        case Tail(start):
            return q >= start
        case Strided(block, local, stride, dense_heads, offset):
            qb, kb = q // block, k // block
            shift = h * max(1, stride // of) + offset
            return h < dense_heads or abs(qb - kb) < local or (kb + shift) % stride == 0
        case Anchored(block, anchor, context):
            return q // block == k // block or k < anchor or q >= context
        case Chunks(chunk, shift):
            return (q + shift) // chunk == (k + shift) // chunk
        case Shifted(chunk, shifts):
            s = shifts[h * len(shifts) // of]
            return (q + s) // chunk == (k + s) // chunk
        case BlockPermutation(block, blocks):
            return k // block == (q // block + h) % blocks
        case Frames(tokens):
            return k // tokens <= q // tokens
        case FrameTiles(tokens, every):
            fq, fk = q // tokens, k // tokens
            return fq == fk or fq % every == 0 or fk % every == 0
        case Neighborhood():
            return neighbours(mask, q, k)
        case Windows():
            cells: Any = grid_cells(tuple(mask.grid))
            each: Any = zip(cells[q], cells[k], mask.window, mask.shift, strict=True)  # type: ignore[arg-type]
            return all((a + s) // w == (b + s) // w for a, b, w, s in each)
    return None


@lru_cache
def grid_cells(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(product(*map(range, grid)))


@lru_cache
def by_brick(grid: tuple[int, ...], brick: tuple[int, ...]) -> dict[int, int]:
    """Where each position of the grid stands, brick after brick."""
    cells = grid_cells(grid)

    def key(position: int) -> tuple[list[int], tuple[int, ...]]:
        cell = cells[position]
        return [x // b for x, b in zip(cell, brick, strict=True)], cell

    return {position: place for place, position in enumerate(sorted(range(len(cells)), key=key))}


def neighbours(mask: Any, q: int, k: int) -> bool:
    cells = grid_cells(mask.grid)
    each = zip(
        cells[q], cells[k], mask.grid, mask.window, mask.dilation, mask.stride, mask.causal, strict=True
    )
    return all(along(*axis) for axis in each)


def along(q: int, k: int, size: int, w: int, d: int, s: int, causal: bool) -> bool:
    """One axis, as NATTEN defines it."""
    x, n = q // d, len(range(q % d, size, d))
    if causal:
        leader = min((x // s) * s + s - 1, n - 1)
        return q % d == k % d and leader - w < k // d <= x
    leader = min((x // s) * s + s // 2, n - 1)
    start = min(max(leader - w // 2, 0), n - w)
    return q % d == k % d and start <= k // d < start + w


def matrix(mask: Mask, q: Spans, k: Spans, *, h: int = 0, of: int = 1, row: int = 0) -> Tensor:
    """`sees` for all held tokens: bool [queries, keys]."""
    at_q, at_k = masks.listed(q), masks.listed(k)
    rows = [[sees(mask, i, j, h=h, of=of, row=row) for j in at_k] for i in at_q]
    return torch.tensor(rows, dtype=torch.bool).view(len(at_q), len(at_k))


def truth(mask: Mask, q: Spans, k: Spans, kv_heads: int) -> Tensor:
    """bool [mask rows, kv heads, queries, keys]."""
    rows = [
        torch.stack([matrix(mask, q, k, h=h, of=kv_heads, row=row) for h in range(kv_heads)])
        for row in range(mask.batch())
    ]
    return torch.stack(rows)


def seen(mask: Mask, q: Spans, k: Spans) -> Tensor:
    """bool [mask rows, kv heads, queries, keys]."""
    shape = mask.batch(), KV_HEADS, total(q), total(k)
    return visible(lower(mask, q, k, KV_HEADS, CPU)).expand(shape)


def line(mask: Mask, q: int, keys: int, *, h: int = 0, of: int = 1) -> str:
    """The keys that a query sees, by the package, held against plain Python on the way."""
    found = visible(lower(mask.heads([h], of), (Span(q, 1),), (Span(0, keys),), 1, CPU))
    row = found.expand(1, 1, 1, keys).flatten().int().tolist()
    assert row == [int(sees(mask, q, k, h=h, of=of)) for k in range(keys)]
    return "".join(map(str, row))


def tiled(x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Whether any and whether every pair of each tile is visible."""

    def some(x: Tensor) -> Tensor:
        rows = (row.split(size[1], -1) for row in x.split(size[0], -2))
        return torch.stack([torch.stack([t.flatten(-2).any(-1) for t in row], -1) for row in rows], -2)

    return some(x), ~some(~x)


def check_classification(mask: Mask, q: Spans, k: Spans, size: tuple[int, int]) -> None:
    real_some, real_every = tiled(seen(mask, q, k), size)
    bare = Range(*bounds(q, size[0])), Range(*bounds(k, size[1]))
    for own, keys in (bare, (held(q, size[0], CPU), held(k, size[1], CPU))):
        some, every = classify(mask, own, keys, KV_HEADS)
        assert not (real_some & ~some).any(), f"{mask}: a tile called empty holds work"
        assert not (every & ~real_every).any(), f"{mask}: a tile called full is not"


# Each mask for KV_HEADS over the positions of WHOLE.
EACH: list[Mask] = [
    Tail(0),
    Tail(13),
    Heads(1, 3),
    Strided(4, 1, 4),
    Strided(3, 2, 8),
    Strided(5, 0, 3, dense_heads=1),
    Strided(2, 1, 8, offset=1),
    Strided(1, 0, 4),
    Strided(7, 1, 1),
    Anchored(8, 3, 50),
    Anchored(5, 0, 0),
    Anchored(16, 8, 100),
    Chunks(8, 3),
    Shifted(10, (0, 5)),
    Shifted(9, (0, 3, 6)),
    Shifted(16, (4,)),
    BlockPermutation(6, 10),
    BlockPermutation(20, 3),
    BlockPermutation(60, 1),
    Neighborhood((60,), 7),
    Neighborhood((61,), 4, dilation=3),
    Neighborhood((60,), 9, dilation=2, stride=4, causal=True),
    Neighborhood((60,), 5, dilation=7),
    Neighborhood((60,), 60, stride=60),
    Neighborhood((6, 10), 3),
    Neighborhood((10, 6), (4, 2), stride=(3, 2)),
    Neighborhood((7, 9), 2, dilation=(3, 4), stride=2),
    Neighborhood((6, 10), (3, 5), stride=(1, 3), causal=(True, False)),
    Neighborhood((3, 4, 5), (2, 3, 3), causal=(True, False, False)),
    Neighborhood((4, 4, 4), (2, 4, 1), dilation=(2, 1, 3), stride=(2, 3, 1)),
    Windows((60,), 7, 3),
    Windows((6, 10), (3, 4)),
    Windows((6, 10), (3, 4), (1, 2)),
    Windows((3, 4, 5), 2, (0, 1, 1)),
    BrickByBrick(Strided(4, 1, 4), (6, 10), (2, 5)),
    BrickByBrick(Strided(4, 2, 3) & Causal(), (7, 9), (2, 4)),
    BrickByBrick(Anchored(8, 8, 50), (3, 4, 5), 2),
    BrickByBrick(Window(5, 3) | Heads(1, 3), (60,), 7) & Causal(),
    Documents((0, 12, 30), BrickByBrick(Shifted(10, (0, 5)), (6, 5), (2, 3))),
    BrickByBrick(BrickByBrick(Window(4, 0), (4, 15), (2, 3)), (6, 10), (4, 4)),
    Frames(7),
    Frames(100),
    FrameTiles(5, 3),
    FrameTiles(9, 1),
    PerHead((Causal(), Window(5), First(3) | Window(2), Causal())),
    PerHead((Full(), Strided(4, 1, 3), Full(), Shifted(6, (0, 3)))),
    PerHead((Window(4, 4),) * 4),
]


def random_pattern(draw: Random, length: int, batch: int = 1, depth: int = 2) -> Mask:
    """A composition for 4 kv heads and positions below 60, documents among them."""
    if depth == 0 or draw.random() < 0.2:
        if draw.random() < 0.3:
            return masks.random_leaf(draw, length, batch)
        leaf = draw.choice(EACH)
        starts = (0, *sorted(draw.choices(range(1, length), k=2)))
        return Documents(starts, leaf) if draw.random() < 0.3 else leaf
    a, b = (random_pattern(draw, length, batch, depth - 1) for _ in range(2))
    if draw.random() < 0.1:
        return BrickByBrick(a, (5, 12), (draw.randrange(1, 6), draw.randrange(1, 13)))
    if draw.random() < 0.15:
        return PerHead(tuple(draw.choice([a, b]) for _ in range(4)))
    return a & b if draw.random() < 0.5 else a | b
