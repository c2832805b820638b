"""Even shares of work: how much each query costs under a mask, and which rank takes which chunk of them."""

from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush

import torch
from torch import Tensor

from ..kernels.concrete import concrete
from ..kernels.count import keys_per_query
from ..kernels.heads import Composed, Heads, PerHead
from ..kernels.layers import PerLayer
from ..kernels.mask import And, Bound, Documents, Mask, Or
from ..kernels.neighborhood import brick_order
from ..kernels.ordered import BrickByBrick
from ..kernels.patterns import Shifted, Strided
from ..kernels.span import Span, Spans

HEADS = 8  # that stand for all heads of a mask that does not say how many there are
ESTIMATE = 2**26  # pairs in partial tiles beyond which the work is estimated: a second of one core
CLOSE = 1.002  # max / mean work at which swapping ends


@dataclass(frozen=True)
class InBricks(Composed):
    """`inner`, over tokens that are dealt out brick after brick (see `brick_order`) and not row by row: the
    n-th query of a placement is the n-th of that order. What sees what is `inner`'s.
    """

    inner: Mask
    grid: tuple[int, ...]
    brick: tuple[int, ...]
    dilation: int | tuple[int, ...] = 1

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        return self.inner.per_head

    def batch(self) -> int:
        return self.inner.batch()

    def parts(self, of: int) -> Mask:
        return self.inner


def heads_of(mask: Mask) -> int:
    """How many kv heads to take the work of a mask over, where k is not at hand: as many as `PerHead` or a
    bound mask has, else enough to tell apart what `Shifted` and `Heads` tell apart, and at most 8 of the
    heads of a `Strided` mask, whose work is alike.
    """
    if isinstance(mask, Bound):
        return len(mask.kv_indices)
    exact, enough = _wanted(mask)
    return exact or enough


def _wanted(mask: Mask | None) -> tuple[int, int]:
    """The number of heads that the mask insists on, or 0, and the number that is enough otherwise."""
    match mask:
        case None:
            return 0, 1
        case And(left, right) | Or(left, right) | PerLayer(left, right):
            a, b = _wanted(left), _wanted(right)
            return max(a[0], b[0]), max(a[1], b[1])
        case Documents(inner=inner) | InBricks(inner=inner) | BrickByBrick(inner=inner):
            return _wanted(inner)
        case PerHead(masks):
            return len(masks), len(masks)
        case Strided(stride=stride):
            return 0, min(stride, HEADS)
        case Shifted(shifts=shifts):
            return 0, len(shifts)
        case Heads(stop=stop):
            return 0, stop + 1
    return 0, HEADS if mask.per_head else 1


@lru_cache(maxsize=8)
@concrete
def work_of_queries(mask: Mask, length: int, kv_heads: int, most: int) -> Tensor:
    """Visible keys of each of `length` queries, in the order in which they are dealt out, summed over the
    mask's batch rows and over the kv heads if it tells them apart: int64 [length], not to be written to.
    Exact up to `most` pairs in partial tiles.
    """
    whole: Spans = (Span(0, length),) if length else ()
    if isinstance(mask, InBricks):
        whole = brick_order(mask.grid, mask.brick, mask.dilation)
    return keys_per_query(mask, whole, whole, kv_heads, most=most)


def shares(work: Tensor, size: int) -> list[int]:
    """The rank of each chunk, from its work, int64 [chunks]: as even as can be, and each rank gets as many
    chunks as any other, or one more.

    Two answers are compared: greedy, the heaviest chunk first to the least loaded rank (Graham 1969, with
    equal counts), and runs of neighbours, which share keys; both are mended by swaps. The runs win where they
    are as even.
    """
    runs, greedy = (_mended(work, start, size) for start in (_runs(len(work), size), _greedy(work, size)))
    mean = max(1.0, float(work.sum()) / size)
    uneven, best = (float(_loads(work, x, size).max()) / mean for x in (runs, greedy))
    taken: list[int] = (runs if uneven <= max(best, CLOSE) else greedy).tolist()
    return taken


def _loads(work: Tensor, owner: Tensor, size: int) -> Tensor:
    return work.new_zeros(size).index_add_(0, owner, work)


def _runs(chunks: int, size: int) -> Tensor:
    """Neighbours together: int64 [chunks]."""
    edges = torch.tensor([chunks * r // size for r in range(size + 1)])
    return torch.arange(size).repeat_interleave(edges.diff())


def _greedy(work: Tensor, size: int) -> Tensor:
    """The heaviest chunk left to the least loaded rank that may take more; ties to the first."""
    free = torch.bincount(_runs(len(work), size), minlength=size).tolist()
    heap = [(0, r) for r in range(size) if free[r]]
    owner, loads = [0] * len(work), work.tolist()
    for chunk in work.argsort(descending=True, stable=True).tolist():
        load, rank = heappop(heap)
        owner[chunk] = rank
        free[rank] -= 1
        if free[rank]:
            heappush(heap, (load + loads[chunk], rank))
    return torch.tensor(owner, dtype=torch.int64)


def _mended(work: Tensor, owner: Tensor, size: int) -> Tensor:
    """The most loaded rank swaps a chunk with one that has little, until all are close or no swap helps."""
    owner, loads = owner.clone(), _loads(work, owner, size)
    limit = CLOSE * float(work.sum()) / size
    for _ in range(4 * len(work)):
        most = int(loads.argmax())
        if int(loads[most]) <= limit or not _swapped(work, owner, loads, most):
            break
    return owner


def _swapped(work: Tensor, owner: Tensor, loads: Tensor, most: int) -> bool:
    """Swaps a chunk of rank `most` with one of the least loaded rank that can help; False if none can."""
    mine = (owner == most).nonzero().flatten()
    for other in loads.argsort(stable=True).tolist():
        half = int(loads[most] - loads[other]) // 2
        if half < 1:
            return False
        theirs = (owner == other).nonzero().flatten()
        if not len(theirs):
            continue
        order = theirs[work[theirs].argsort(stable=True)]
        wanted = work[mine] - half
        # the chunk just above and just below what would make the two equal
        above = torch.searchsorted(work[order], wanted)
        at = torch.stack((above - 1, above)).clamp(0, len(order) - 1)
        moved = work[mine] - work[order[at]]
        miss = (moved - half).abs().where((moved > 0) & (moved < 2 * half), torch.iinfo(torch.int64).max)
        side, i = divmod(int(miss.argmin()), len(mine))
        gain = int(moved[side, i])
        if not 0 < gain < 2 * half:
            continue
        x, y = mine[i], order[at[side, i]]
        owner[x], owner[y] = other, most
        loads[most] -= gain
        loads[other] += gain
        return True
    return False
