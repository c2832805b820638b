"""The mask predicate inside a Triton kernel: its tree a compile-time constant, its numbers run-time data."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lower import Lowered
from .mask import Tree

LEAF, BOTH, EITHER, DOCUMENTS, MOVED = (tl.constexpr(i) for i in range(5))


class Operands(NamedTuple):
    """What the predicate reads at run time; one kernel argument. All int32."""

    numbers: Tensor  # the parameters of all leaves
    heads: Tensor  # global kv head of each local one
    q: Tensor  # positions [Nq]
    k: Tensor  # positions [Nk]
    tables_q: Tensor  # what documents and moved masks take off positions [tables, rows, Nq]
    tables_k: Tensor  # the same [tables, rows, Nk]
    rows: int  # 1, or the batch size


def operands(low: Lowered) -> Operands:
    """The run-time half of a lowered mask."""
    device = low.q.device
    numbers, heads = _int32(low.numbers, device), _int32(low.heads, device)
    return Operands(numbers, heads, low.q, low.k, low.tables_q, low.tables_k, low.tables_q.shape[1])


def constant(tree: Tree) -> Tree:
    """The compile-time half: the tree with numbers for words.

    Each leaf also names the hash of its predicate's source: Triton's cache on disk tells functions inside a
    tuple apart by name only, and would go on serving a kernel with the old predicate after an edit.
    """
    if tree[0] == "leaf":
        _, jit, first, count = tree
        if isinstance(jit, triton.runtime.JITFunction):
            return (LEAF.value, jit, first, count, jit.cache_key)
        return (LEAF.value, jit.fn, first, count)  # interpreted: the operators of plain Python do
    if tree[0] in ("documents", "moved"):
        return ((DOCUMENTS if tree[0] == "documents" else MOVED).value, tree[1], constant(tree[2]))
    if tree[0] in ("and", "or"):
        return ((BOTH if tree[0] == "and" else EITHER).value, constant(tree[1]), constant(tree[2]))
    raise ValueError(f"the kernels know no mask node {tree[0]!r}; allowed: leaf, documents, moved, and, or")


@lru_cache(maxsize=256)
def _int32(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values or (0,), dtype=torch.int32, device=device)


@triton.jit
def visible(TREE: tl.constexpr, mask, row, local_head, m, n, NQ, NK):  # type: ignore[no-untyped-def]
    """Whether held query m sees held key n, index tensors that broadcast to a tile; false beyond the ends."""
    inside_q, inside_k = m < NQ, n < NK
    q = tl.load(mask.q + m, mask=inside_q, other=0)
    k = tl.load(mask.k + n, mask=inside_k, other=0)
    h = tl.load(mask.heads + local_head)
    return _see(TREE, mask, row, h, q, k, m, n, NQ, NK) & inside_q & inside_k


@triton.constexpr_function
def _part(tree: Any, i: int) -> Any:
    # tree[i] inside a kernel would unpack the subtree, which Triton 3.6 cannot do with nested tuples
    return tree[i]


@triton.jit
def _see(TREE: tl.constexpr, mask, row, h, q, k, m, n, NQ, NK):  # type: ignore[no-untyped-def]
    if _part(TREE, 0) == LEAF:
        if _part(TREE, 3) == 0:
            return _part(TREE, 1)(q, k, h)
        else:
            return _part(TREE, 1)(q, k, h, *_numbers(mask.numbers, _part(TREE, 2), _part(TREE, 3)))
    elif _part(TREE, 0) == BOTH:
        a = _see(_part(TREE, 1), mask, row, h, q, k, m, n, NQ, NK)
        return a & _see(_part(TREE, 2), mask, row, h, q, k, m, n, NQ, NK)
    elif _part(TREE, 0) == EITHER:
        a = _see(_part(TREE, 1), mask, row, h, q, k, m, n, NQ, NK)
        return a | _see(_part(TREE, 2), mask, row, h, q, k, m, n, NQ, NK)
    else:
        table = (row + _part(TREE, 1) * mask.rows).to(tl.int64)
        start_q = tl.load(mask.tables_q + table * NQ + m, mask=m < NQ, other=0)
        start_k = tl.load(mask.tables_k + table * NK + n, mask=n < NK, other=0)
        inner = _see(_part(TREE, 2), mask, row, h, q - start_q, k - start_k, m, n, NQ, NK)
        if _part(TREE, 0) == DOCUMENTS:
            return (start_q == start_k) & inner
        else:
            return inner


@triton.jit
def _numbers(numbers, FIRST: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    if COUNT == 1:
        return (tl.load(numbers + FIRST),)
    else:
        return (tl.load(numbers + FIRST),) + _numbers(numbers, FIRST + 1, COUNT - 1)
