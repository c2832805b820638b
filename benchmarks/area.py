"""A mask as a function of token indices: what FlexAttention takes, and what counts the visible pairs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longspan.kernels.lower import Lowered, lower
from longspan.kernels.mask import Mask, Tree
from longspan.kernels.span import Spans, total
from longspan.kernels.tile import tiles

Sees = Callable[[Tensor, Tensor, Tensor], Tensor]
Node = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

TILE = 64  # of S2's blocks, so that most of its tiles are full
AT_ONCE = 2**12  # partial tiles whose pairs are counted together: about half a gigabyte


def by_index(low: Lowered) -> Sees:
    """Whether kv head h lets held query i see held key j: (h, i, j), integer tensors that broadcast.

    Of a mask that is the same for every row of a batch.
    """
    heads = torch.tensor(low.heads, device=low.q.device)
    node = _node(low, low.tree)

    def sees(h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return node(i, j, low.q[i], low.k[j], heads[h])

    return sees


def _node(low: Lowered, tree: Tree) -> Node:
    if tree[0] == "leaf":
        return _leaf(tree[1].fn, low.numbers[tree[2] : tree[2] + tree[3]])
    if tree[0] in ("documents", "moved"):
        tables = low.tables_q[tree[1], 0], low.tables_k[tree[1], 0]
        return _taken_off(*tables, _node(low, tree[2]), apart=tree[0] == "documents")
    left, right = (_node(low, part) for part in tree[1:])
    if tree[0] == "and":
        return lambda i, j, q, k, h: left(i, j, q, k, h) & right(i, j, q, k, h)
    return lambda i, j, q, k, h: left(i, j, q, k, h) | right(i, j, q, k, h)


def _leaf(predicate: Any, numbers: tuple[int, ...]) -> Node:
    return lambda i, j, q, k, h: predicate(q, k, h, *numbers)


def _taken_off(from_q: Tensor, from_k: Tensor, inner: Node, *, apart: bool) -> Node:
    """The mask at positions less these; apart: those of which different numbers are taken off see nothing."""

    def node(i: Tensor, j: Tensor, q: Tensor, k: Tensor, h: Tensor) -> Tensor:
        a, b = from_q[i], from_k[j]
        seen = inner(i, j, q - a, k - b, h)
        return (a == b) & seen if apart else seen

    return node


def area(mask: Mask, at: Spans, kv_heads: int, device: torch.device) -> float:
    """Visible (query, key) pairs of tokens that see each other, averaged over kv heads."""
    lists = tiles(mask, at, at, kv_heads, size=(TILE, TILE), transpose=False, device=device)
    sees, length = by_index(lower(mask, at, at, kv_heads, device)), total(at)
    row, column = _listed(lists.full, lists.index)
    sizes = [(length - x * TILE).clamp(max=TILE) for x in (row % lists.rows, column)]
    pairs, tile = int((sizes[0] * sizes[1]).sum()), torch.arange(TILE, device=device)
    row, column = _listed(lists.partial, lists.index)
    for rows, columns in zip(row.split(AT_ONCE), column.split(AT_ONCE), strict=True):
        h, i = rows // lists.rows, rows % lists.rows
        i, j = i[:, None, None] * TILE + tile[:, None], columns[:, None, None] * TILE + tile
        inside = (i < length) & (j < length)
        i, j = (x.clamp(max=length - 1) for x in (i, j))
        pairs += int((sees(h[:, None, None], i, j) & inside).sum())
    return pairs / lists.heads


def _listed(ranges: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the listed tiles, from where each row's part of the index begins and ends."""
    count = ranges.long().diff()[:, 0]
    row = torch.arange(len(count), device=count.device).repeat_interleave(count)
    place = torch.arange(len(row), device=count.device) - (count.cumsum(0) - count)[row]
    return row, index[ranges[row, 0] + place].long()
