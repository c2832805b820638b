"""A mask as data for local tokens, and its predicate on torch tensors."""

from typing import NamedTuple

import torch
from torch import Tensor

from .kept import kept
from .mask import Frame, Mask, Tree, bound_heads
from .span import Spans, positions


class Lowered(NamedTuple):
    """A mask as data for local tokens: what the reference evaluates and the kernels load."""

    tree: Tree
    numbers: tuple[int, ...]
    heads: tuple[int, ...]  # global kv head of each local one
    q: Tensor  # int32 [Nq], global positions
    k: Tensor  # int32 [Nk]
    tables_q: Tensor  # int32 [tables, 1 or batch, Nq], what a document or a moved mask takes off positions
    tables_k: Tensor  # int32 [tables, 1 or batch, Nk]


@kept()
def lower(mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int, device: torch.device) -> Lowered:
    """Tree, numbers and per-token data of a mask for queries at `at_q` and keys at `at_k`. Cached by
    value.
    """
    heads, of = bound_heads(mask, kv_heads)
    q, k = positions(at_q, device), positions(at_k, device)
    frame = Frame(q[None], k[None], of)
    tree = mask.lower(frame)
    rows = mask.batch()
    tables = [
        torch.stack([t[i].expand(rows, -1) for t in frame.tables]).int() for i in (0, 1) if frame.tables
    ]
    if not tables:
        tables = [torch.zeros(0, 1, len(x), dtype=torch.int32, device=device) for x in (q, k)]
    return Lowered(tree, tuple(frame.numbers), heads, q.int(), k.int(), *tables)


def visible(low: Lowered) -> Tensor:
    """The predicate on torch tensors: bool, broadcastable to [batch, kv heads, Nq, Nk]."""
    q, k = low.q.long()[None, None, :, None], low.k.long()[None, None, None, :]
    h = torch.tensor(low.heads, device=q.device)[None, :, None, None]
    return see(low, low.tree, q, k, h)


def see(low: Lowered, tree: Tree, q: Tensor, k: Tensor, h: Tensor) -> Tensor:
    """The predicate at positions q [..., Nq, 1], k [..., 1, Nk] and global kv heads h, all of four dims;
    the tables of `low` are [tables, first dim, Nq or Nk].
    """
    if tree[0] == "leaf":
        _, jit, first, count = tree
        seen: Tensor = jit.fn(q, k, h, *low.numbers[first : first + count])
        return seen
    if tree[0] in ("documents", "moved"):
        start_q, start_k = (
            low.tables_q[tree[1]].long()[:, None, :, None],
            low.tables_k[tree[1]].long()[:, None, None, :],
        )
        inside = see(low, tree[2], q - start_q, k - start_k, h)
        return (start_q == start_k) & inside if tree[0] == "documents" else inside
    a, b = (see(low, part, q, k, h) for part in tree[1:])
    return a & b if tree[0] == "and" else a | b
