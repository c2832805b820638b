"""Mask x spans -> a few large blocks, open, causal or masked: what a dense operator needs for any mask."""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .kept import kept
from .lower import Lowered, lower, visible
from .mask import Mask, Range, Tree
from .selection import Selection
from .span import Span, Spans, cut, total
from .tile import classify

KEPT = 2**24  # (query, key) pairs up to which steps are kept: bounds the memory of the masks in them


class Step(NamedTuple):
    """One call of the operator: a run of local queries over runs of local keys."""

    rows: slice
    keys: Spans
    causal: bool = False  # the i-th of the rows sees the j-th of the keys iff j <= i
    seen: Tensor | None = None  # bool [rows, keys]; None: what `causal` says
    dead: Tensor | None = None  # bool [rows]: those of which `seen` is false throughout; None: no row is


class Grid(NamedTuple):
    """The tiles of one (batch row, kv head): their borders in local tokens, and how they are classified."""

    low: Lowered
    q: list[int]
    k: list[int]
    full: Tensor  # bool [q tiles, k tiles]
    partial: Tensor


def steps(
    mask: Mask, at_q: Spans, at_k: Spans, *, kv_heads: int, group: tuple[int, int] = (0, 0)
) -> Iterable[Step]:
    """Steps that meet each visible pair once: those of one (mask row, kv head), rows ascending.

    Steps with the same rows follow each other, and their results are to be merged. No step, no visible key.
    Kept for the next call, by value, unless the sequence is long: then they are made while they are read.
    """
    small = total(at_q) * total(at_k) <= KEPT
    return (_kept if small else _made)(mask, at_q, at_k, kv_heads, group)


@kept()
def _kept(mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int, group: tuple[int, int]) -> tuple[Step, ...]:
    return tuple(_made(mask, at_q, at_k, kv_heads, group))


def _made(mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int, group: tuple[int, int]) -> Iterator[Step]:
    grid, fine = (_grid(mask, at_q, at_k, kv_heads, group, share) for share in (1, 4))
    return _through(grid, fine)


def selected(
    selection: Selection, mask: Mask, at_q: Spans, at_k: Spans, *, kv_heads: int, group: tuple[int, int]
) -> Iterator[Step]:
    """`steps` of the chosen blocks alone; group: (batch row, kv head)."""
    row, head = group
    low = _of_group(lower(mask, at_q, at_k, kv_heads, torch.device("cpu")), group)
    q, k = (
        [*range(0, len(at), n), len(at)]
        for at, n in zip((low.q, low.k), selection.size, strict=True)
    )  # fmt: skip
    found = classify(mask, _range(low.q, q), _range(low.k, k), kv_heads)
    own, some, every = (
        x[min(row, len(x) - 1), min(head, x.shape[1] - 1)] for x in (selection.chosen, *found)
    )
    grid = Grid(low, q, k, every & own, some & ~every & own)
    return _through(grid, grid)


def _through(grid: Grid, fine: Grid) -> Iterator[Step]:
    first = 0
    last: Tensor | None = None
    while first < len(grid.q) - 1:
        count, found = _next_steps(grid, fine, first)
        for step in found:
            # windows look alike in every row: hold the mask once
            alike = step.seen is not None and last is not None and torch.equal(step.seen, last)
            last = last if alike else step.seen
            yield step._replace(seen=last)
        first += count


def _grid(mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int, group: tuple[int, int], share: int) -> Grid:
    """Square tiles, or a `share` of each along the keys."""
    row, head = group
    low = _of_group(lower(mask, at_q, at_k, kv_heads, torch.device("cpu")), group)
    tile = 128 if max(len(low.q), len(low.k)) <= 2048 else 256
    documents = _documents(low.tree)
    q = _borders(low.q, low.tables_q[documents], (at_q, at_k), tile)
    k = _borders(low.k, low.tables_k[documents], (at_k, at_q), tile // share)
    some, every = classify(mask, _range(low.q, q), _range(low.k, k), kv_heads)
    some, every = some[row, head], every[row, head]
    return Grid(low, q, k, every, some & ~every)


def _of_group(low: Lowered, group: tuple[int, int]) -> Lowered:
    """Of one batch row, of those that the mask tells apart, and one kv head."""
    row, head = min(group[0], low.tables_q.shape[1] - 1), group[1]
    return low._replace(
        heads=low.heads[head : head + 1],
        tables_q=low.tables_q[:, row : row + 1],
        tables_k=low.tables_k[:, row : row + 1],
    )


def _documents(tree: Tree) -> list[int]:
    """The tables that hold the starts of documents. Those of tokens in another order change at every brick's
    edge.
    """
    if tree[0] == "documents":
        return [tree[1], *_documents(tree[2])]
    return [x for part in tree[1:] for x in _documents(part)] if tree[0] in ("and", "or") else []


def _borders(at: Tensor, tables: Tensor, spans: tuple[Spans, Spans], tile: int) -> list[int]:
    """Borders of tiles: where spans and documents end, so that few tiles are partial, and each `tile` tokens.

    Also where a span of the other side starts, so that a diagonal between the two meets both at a border.
    """
    own, other = spans
    starts = torch.tensor([s.start for s in other])
    change = (tables[:, 0, 1:] != tables[:, 0, :-1]).any(0)
    ends = {len(at), *accumulate(s.length for s in own)}
    ends |= {i + 1 for i in _columns(change)} | set(_columns(torch.isin(at, starts)))
    borders = [0]
    for end in sorted(ends):
        if end == len(at) or end - borders[-1] >= tile // 4:
            borders += [*range(borders[-1] + tile, end, tile), end]
    return borders


def _range(at: Tensor, borders: list[int]) -> Range:
    """Bounds and positions of the tiles; a short tile repeats its last position."""
    edge = torch.tensor(borders)
    index = edge[:-1, None] + torch.arange(int(edge.diff().max()))
    held = at.long()[index.minimum(edge[1:, None] - 1)]
    return Range(held.amin(1), held.amax(1), held[None])


def _next_steps(grid: Grid, fine: Grid, i: int) -> tuple[int, list[Step]]:
    """How many rows of tiles, from row i, and the steps that do them; `fine` has the same rows, and columns
    that follow the mask more closely.
    """
    n = _triangle(grid, i)
    if not n and grid.partial[i].any():
        return 1, _masked(fine, i)
    found = []
    if n:
        first = int(grid.partial[i].nonzero()[0])
        found.append(Step(_rows(grid, i, n), _keys(grid, range(first, first + n)), causal=True))
    else:
        n = _alike(grid, i)
    if grid.full[i].any():
        found.append(Step(_rows(grid, i, n), _keys(grid, _columns(grid.full[i]))))
    return n, found


def _triangle(grid: Grid, i: int) -> int:
    """Rows of tiles from i on that see the same full tiles and an exactly causal triangle; 0 for none."""
    columns = _columns(grid.partial[i])
    if len(columns) != 1:
        return 0
    first, n = columns[0], 0
    full, partial = grid.full[i].clone(), grid.partial[i].clone()
    while i + n < len(grid.full) and _same(grid, i + n, full, partial) and _diagonal(grid, i + n, first + n):
        full[first + n], partial[first + n] = True, False
        n += 1
        if first + n == len(full):
            break
        partial[first + n] = True
    return n


def _same(grid: Grid, i: int, full: Tensor, partial: Tensor) -> bool:
    return torch.equal(grid.full[i], full) and torch.equal(grid.partial[i], partial)


def _diagonal(grid: Grid, i: int, j: int) -> bool:
    size = grid.q[i + 1] - grid.q[i]
    return size == grid.k[j + 1] - grid.k[j] and torch.equal(_seen(grid, i, j), _tril(size))


def _tril(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).tril()


def _alike(grid: Grid, i: int) -> int:
    """Rows of tiles from i on that see the same tiles."""
    n = 1
    while i + n < len(grid.full) and _same(grid, i + n, grid.full[i], grid.partial[i]):
        n += 1
    return n


def _masked(grid: Grid, i: int) -> list[Step]:
    """The steps of one row of tiles with partial ones among them."""
    rows, full, partial = _rows(grid, i, 1), grid.full[i], grid.partial[i]
    size = torch.tensor(grid.k).diff()
    apart = bool(size[full].sum() > size[partial].sum())
    # over most of the keys one more call costs less than a mask
    found = [Step(rows, _keys(grid, _columns(full)))] if apart else []
    columns = _columns(partial if apart else partial | full)
    if not columns:
        return found
    height = rows.stop - rows.start
    known = torch.ones(height, int(size.max()), dtype=torch.bool)
    seen = torch.cat([known[:, : size[j]] if full[j] else _seen(grid, i, j) for j in columns], 1)
    alive = _columns(seen.any(0))
    if not alive:
        return found
    keys = cut(_keys(grid, columns), alive[0], alive[-1] + 1)
    seen = seen[:, alive[0] : alive[-1] + 1]
    if seen.all():
        return [*found, Step(rows, keys)]
    if seen.shape[1] == height and torch.equal(seen, _tril(height)):
        return [*found, Step(rows, keys, causal=True)]
    dead = ~seen.any(1)
    return [*found, Step(rows, keys, seen=seen, dead=dead if dead.any() else None)]


def _rows(grid: Grid, i: int, n: int) -> slice:
    return slice(grid.q[i], grid.q[i + n])


def _columns(chosen: Tensor) -> list[int]:
    columns: list[int] = chosen.nonzero().flatten().tolist()
    return columns


def _keys(grid: Grid, columns: Iterable[int]) -> Spans:
    """Runs of local keys in these tiles."""
    runs: list[Span] = []
    for j in columns:
        start, stop = grid.k[j], grid.k[j + 1]
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
